import copy
import pickle

import pytest
import torch
import transformers
from tests.models.tiny import FAMILIES, MAX_TOKENS, TASKS, batch, tiny_config, tiny_model, translated
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, BertConfig, BertLMHeadModel, GPT2Config, GPT2Model, XLMRobertaConfig

import longspan
from longspan.models.checkpoints import from_hugging_face, translate_config
from longspan.models.convert import to_hugging_face_longformer, to_long
from longspan.models.plug_in import accelerate

ALL = [(family, task) for family in FAMILIES for task in (None, *TASKS)]
WINDOWS = {"longformer": {"attention_window": [4, 8, 16]}}  # Hugging Face wants windows that divide the largest
SEPARATOR = 2


def pair(family, task=None, **changes):
    """A Hugging Face model, and an accelerated copy."""
    model = tiny_model(family, task, **WINDOWS.get(family, {}) | changes)
    return model, accelerate(copy.deepcopy(model))


def inputs_for(model, task, lengths, tokens=None):
    inputs = batch(model.config, lengths, tokens)
    if model.config.model_type == "longformer" and task in ("question_answering", "multiple_choice"):
        inputs["input_ids"][:, [2, 3, 5]] = SEPARATOR  # its heads want three
    if task == "multiple_choice":
        inputs = {name: value[:, None].expand(-1, 2, -1).clone() for name, value in inputs.items()}
        inputs["input_ids"][:, 1] = torch.where(inputs["attention_mask"][:, 1] == 1, inputs["input_ids"][:, 1], 1)
        inputs["input_ids"][:, 1, 6] = 7
    return inputs


def worst_difference(mine, theirs, attention_mask):
    """The largest difference of two outputs, at tokens; the same fields, tuples and shapes."""
    assert type(mine) is type(theirs)
    assert list(mine) == list(theirs)
    mask = attention_mask.bool().flatten(0, -2)
    worst = 0.0
    for name in theirs:
        parts = [value if isinstance(value, tuple) else (value,) for value in (mine[name], theirs[name])]
        for a, b in zip(*parts, strict=True):
            assert a.shape == b.shape
            at_tokens = (a - b)[mask] if a.shape[:2] == mask.shape else a - b
            worst = max(worst, at_tokens.abs().max().item())
    return worst


@pytest.mark.parametrize(("family", "task"), ALL)
def test_every_head_of_every_family_gives_hugging_faces_outputs_and_hidden_states(family, task):
    theirs, mine = pair(family, task)
    inputs = inputs_for(theirs, task, [50, 31, 9])
    with torch.no_grad():
        outputs = [model(**inputs, output_hidden_states=True) for model in (mine, theirs)]
    assert len(outputs[0].hidden_states) == len(outputs[1].hidden_states) == theirs.config.num_hidden_layers + 1
    assert worst_difference(*outputs, inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("tokens", [1, 2, 15, 17, 53, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_tokens_needs_no_multiple_of_a_window(family, tokens):
    theirs, mine = pair(family)
    inputs = batch(theirs.config, [tokens, max(1, tokens // 3)])
    with torch.no_grad():
        assert worst_difference(mine(**inputs), theirs(**inputs), inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("global_tokens", [0, 1, 5, 40, 50])
def test_any_number_of_global_tokens_may_stand_anywhere_and_in_rows_of_unequal_number(global_tokens):
    theirs, mine = pair("longformer")
    inputs = batch(theirs.config, [50, 50, 20])
    generator = torch.Generator().manual_seed(global_tokens)
    chosen = torch.zeros(3, 50, dtype=torch.long)
    for row, number in enumerate((global_tokens, global_tokens // 2, global_tokens)):  # the last row's also in padding
        chosen[row, torch.randperm(50, generator=generator)[:number]] = 1
    inputs["global_attention_mask"] = chosen
    with torch.no_grad():
        assert worst_difference(mine(**inputs), theirs(**inputs), inputs["attention_mask"]) < 1e-5


def test_an_attention_mask_of_two_marks_a_longformers_global_token():
    theirs, mine = pair("longformer")
    inputs = batch(theirs.config, [50, 20])
    inputs["attention_mask"][:, [0, 7]] = 2
    with torch.no_grad():
        assert worst_difference(mine(**inputs), theirs(**inputs), inputs["attention_mask"]) < 1e-5
        assert not torch.equal(mine(**inputs)[0], mine(inputs["input_ids"], inputs["attention_mask"] > 0)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_head_width_may_be_26_as_in_tinybert(family):
    names = {"dim": 52} if family == "distilbert" else {"hidden_size": 52}
    theirs, mine = pair(family, **names)
    inputs = batch(theirs.config, [50, 20])
    with torch.no_grad():
        assert worst_difference(mine(**inputs), theirs(**inputs), inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
def test_the_models_own_attention_implementation_does_not_matter(family, implementation):
    theirs, mine = pair(family, attn_implementation=implementation)
    inputs = batch(theirs.config, [50, 20])
    with torch.no_grad():
        assert worst_difference(mine(**inputs), theirs(**inputs), inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_positions_types_and_positional_arguments_go_where_they_went(family):
    theirs, mine = pair(family)
    inputs = batch(theirs.config, [30, 12])
    offset = translate_config(theirs.config).embeddings_config.position_offset
    positions = torch.arange(30).flip(0)[None].expand(2, -1) + offset + 7
    options = {"inputs_embeds": theirs.get_input_embeddings()(inputs["input_ids"])}
    options |= {"position_ids": positions, "attention_mask": inputs["attention_mask"]}
    if family == "bert":
        options["token_type_ids"] = torch.arange(60).view(2, 30) % 2
    with torch.no_grad():
        assert worst_difference(mine(**options), theirs(**options), inputs["attention_mask"]) < 1e-5
        together = [model(inputs["input_ids"], inputs["attention_mask"]) for model in (mine, theirs)]
        assert worst_difference(*together, inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize(("family", "task"), ALL)
def test_tuples_are_returned_when_asked(family, task):
    theirs, mine = pair(family, task)
    inputs = inputs_for(theirs, task, [30, 12]) | {"return_dict": False, "output_hidden_states": True}
    with torch.no_grad():
        expected, got = theirs(**inputs), mine(**inputs)
    assert type(got) is tuple
    shapes = [[part.shape for part in (value if isinstance(value, tuple) else (value,))] for value in (got[0], got[-1])]
    assert len(got) == len(expected)
    assert len(got[-1]) == theirs.config.num_hidden_layers + 1
    assert shapes == [
        [part.shape for part in (value if isinstance(value, tuple) else (value,))]
        for value in (expected[0], expected[-1])
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_can_ask_for_hidden_states(family):
    theirs, mine = pair(family, output_hidden_states=True)
    inputs = batch(theirs.config, [30])
    with torch.no_grad():
        assert worst_difference(mine(**inputs), theirs(**inputs), inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_probabilities_are_refused_in_one_clear_sentence(family):
    _, mine = pair(family)
    inputs = batch(mine.config, [30])
    with pytest.raises(NotImplementedError, match=r"output_attentions=True .* which longspan never forms"):
        mine(**inputs, output_attentions=True)
    mine.config.output_attentions = True
    with pytest.raises(NotImplementedError, match="output_attentions=True"):
        mine(**inputs)


@pytest.mark.parametrize("task", ["masked_lm", "sequence_classification"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_with_hugging_faces_gradients(family, task):
    no_dropout = {
        "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
        "modernbert": {},
    }.get(family, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    theirs, mine = pair(family, task, **no_dropout)
    inputs = inputs_for(theirs, task, [50, 31])
    labels = inputs["input_ids"] if task == "masked_lm" else torch.tensor([0, 1])
    gradients = []
    for model in (mine, theirs):
        model.train()
        loss = model(**inputs, labels=labels.masked_fill(labels == model.config.pad_token_id, -100)).loss
        loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    stock = {name: value for name, value in gradients[1].items() if "global" not in name}
    base = theirs.base_model_prefix
    encoder = tuple(f"{base}.{part}." for part in ("encoder", "transformer", "layers", "final_norm"))
    theirs_fused = from_hugging_face(
        {name.removeprefix(f"{base}."): value for name, value in stock.items() if name.startswith(encoder)},
        translate_config(theirs.config),
    )
    assert len(theirs_fused) > 20
    for name, expected in theirs_fused.items():
        torch.testing.assert_close(gradients[0][f"{base}.{name}"], expected, rtol=1e-3, atol=1e-6)
    for name, expected in stock.items():
        if not name.startswith(encoder):
            torch.testing.assert_close(gradients[0][name], expected, rtol=1e-3, atol=1e-6)


def test_dropout_is_kept_and_works():
    _, mine = pair("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    assert mine.encoder.config.dropout == 0.3
    assert mine.encoder.config.attention_dropout == 0.2
    assert not mine.encoder.training
    inputs = batch(mine.config, [30])
    mine.train()
    assert not torch.equal(mine(**inputs)[0], mine(**inputs)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_memory_is_doubled_only_q_k_and_v_are_laid_side_by_side(family):
    model = tiny_model(family)
    memory = {value.data_ptr() for value in model.parameters()}
    number = model.num_parameters()
    accelerate(model)
    moved = {name.rpartition(".")[0] for name, value in model.named_parameters() if value.data_ptr() not in memory}
    assert all(name.endswith((".qkv", ".qkv_global")) for name in moved)
    assert model.num_parameters() == number


@pytest.mark.parametrize(("family", "task"), ALL)
def test_what_it_saves_is_a_stock_checkpoint(tmp_path, family, task):
    theirs, mine = pair(family, task)
    stock = theirs.state_dict()
    assert set(mine.state_dict()) == set(stock)
    assert all(torch.equal(value, stock[name]) for name, value in mine.state_dict().items())
    mine.save_pretrained(tmp_path)
    again, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"] and not report["unexpected_keys"]
    inputs = inputs_for(theirs, task, [30, 12])
    with torch.no_grad():
        assert worst_difference(again(**inputs), theirs(**inputs), inputs["attention_mask"]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_a_stock_state_dict(family):
    _, mine = pair(family, "masked_lm")
    other = tiny_model(family, "masked_lm", seed=5, **WINDOWS.get(family, {}))
    mine.load_state_dict(other.state_dict())
    inputs = batch(other.config, [30, 12])
    with torch.no_grad():
        assert worst_difference(mine(**inputs), other(**inputs), inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent_and_still_accelerated(copy_of):
    _, mine = pair("modernbert", "masked_lm")
    inputs = batch(mine.config, [30, 12])
    with torch.no_grad():
        expected = mine(**inputs).logits
        again = copy_of(mine)
        stock = {name: value.clone() for name, value in mine.state_dict().items()}
        for parameter in mine.parameters():
            parameter.zero_()
        assert torch.equal(again(**inputs).logits, expected)
    assert all(torch.equal(value, stock[name]) for name, value in again.state_dict().items())
    assert accelerate(again) is again


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_dtype_may_change_before_and_after(family, dtype):
    theirs, mine = pair(family)
    theirs, mine = theirs.to(dtype), mine.to(dtype)
    before = accelerate(copy.deepcopy(theirs))
    inputs = batch(theirs.config, [30, 12])
    with torch.no_grad():
        outputs = [model(**inputs) for model in (before, mine, theirs)]
    assert outputs[0][0].dtype == dtype
    assert torch.equal(outputs[0][0], outputs[1][0])
    limit = {torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert worst_difference(*outputs[1:], inputs["attention_mask"]) < limit


def test_frozen_layers_stay_frozen():
    model = tiny_model("bert")
    model.encoder.layer[0].requires_grad_(False)
    accelerate(model)
    assert not any(parameter.requires_grad for parameter in model.encoder.blocks[0].parameters())
    assert all(parameter.requires_grad for parameter in model.encoder.blocks[1].parameters())


def test_a_frozen_query_beside_a_trained_key_is_refused_and_the_model_left_as_it_was():
    model = tiny_model("bert")
    model.encoder.layer[1].attention.self.query.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.qkv\.weight are frozen.*freeze all three or none"):
        accelerate(model)
    assert type(model.encoder).__name__ == "BertEncoder"


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_works_turned_on_before_or_after(family, before):
    model = tiny_model(family, **WINDOWS.get(family, {}))
    if before:
        model.activation_checkpointing_enable()
        accelerate(model)
    else:
        accelerate(model)
        model.activation_checkpointing_enable()
    assert model.encoder.gradient_checkpointing
    model.train()(**batch(model.config, [30]))[0].square().sum().backward()
    assert model.encoder.blocks[0].ffn_in.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("task", [None, "sequence_classification"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "longformer"])
def test_inputs_longer_than_the_position_table_name_to_long(family, task):
    _, mine = pair(family, task)
    with pytest.raises(
        ValueError, match=r"positions for 65 tokens and this model has 64: .*to_long\(.*max_tokens=65\)"
    ):
        mine(**batch(mine.config, [MAX_TOKENS + 1]))
    with pytest.raises(ValueError, match="positions for 70 tokens and this model has 64"):
        mine.base_model(inputs_embeds=torch.zeros(1, 70, 24))
    offset = translate_config(mine.config).embeddings_config.position_offset
    with pytest.raises(ValueError, match="positions for 65 tokens"):
        mine(**batch(mine.config, [3]), position_ids=torch.tensor([[0, 1, 64]]) + offset)
    longer = to_long(mine, max_tokens=65, window=8)  # what the message advises works on the accelerated model itself
    with torch.no_grad():
        assert longer(**batch(mine.config, [MAX_TOKENS + 1]))[0].isfinite().all()


@pytest.mark.parametrize("family", ["roberta", "longformer"])
def test_padding_beyond_the_position_table_is_no_obstacle_where_padding_is_not_numbered(family):
    theirs, mine = pair(family)
    inputs = batch(theirs.config, [MAX_TOKENS, 9], tokens=80)
    with torch.no_grad():
        assert worst_difference(mine(**inputs), theirs(**inputs), inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("mask", [torch.ones(1, 30, 30), torch.ones(1, 1, 30, 30), {"full_attention": None}])
def test_masks_of_pairs_of_tokens_are_refused(mask):
    _, mine = pair("modernbert")
    with pytest.raises(NotImplementedError, match=r"attention_mask must be \[B, N\]"):
        mine(batch(mine.config, [30])["input_ids"], attention_mask=mask)


def test_inputs_must_be_given_once():
    _, mine = pair("bert")
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        mine()


def test_accelerating_twice_or_accelerating_our_own_model_changes_nothing():
    _, mine = pair("bert", "masked_lm")
    encoder = mine.bert.encoder
    assert accelerate(mine) is mine
    assert mine.bert.encoder is encoder
    ours = translated(tiny_model("bert"))
    assert accelerate(ours) is ours


def test_another_family_is_refused_with_the_families_that_work():
    model = GPT2Model(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=99))
    with pytest.raises(NotImplementedError, match=r"gpt2.*bert.*distilbert.*longformer.*modernbert.*roberta"):
        accelerate(model)


def test_decoders_are_refused():
    config = BertConfig(**tiny_config("bert").to_diff_dict() | {"is_decoder": True})
    with pytest.raises(NotImplementedError, match="is_decoder"):
        accelerate(BertLMHeadModel(config))


def test_what_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match=r"takes a transformers model.*got Linear"):
        accelerate(torch.nn.Linear(2, 2))


def test_a_resized_vocabulary_works_and_is_saved(tmp_path):
    _, mine = pair("bert", "masked_lm")
    mine.resize_token_embeddings(120, mean_resizing=False)
    inputs = {"input_ids": torch.tensor([[110, 5, 119]])}
    with torch.no_grad():
        expected = mine(**inputs).logits
        mine.save_pretrained(tmp_path)
        again = type(mine).from_pretrained(tmp_path)
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_it_compiles_into_one_graph(family):
    _, mine = pair(family, "sequence_classification")
    compiled = torch.compile(mine, backend="eager", fullgraph=True)
    inputs = batch(mine.config, [30, 12])
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, mine(**inputs).logits, rtol=0, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_memory_is_linear_where_hugging_faces_longformer_forms_an_n_by_n_mask():
    tokens = 1024
    theirs, mine = pair("longformer", max_position_embeddings=tokens + 2)
    inputs = batch(theirs.config, [tokens, 1000])
    largest = []
    for model in (mine, theirs):
        with torch.no_grad(), LargestTensor() as mode:
            model(**inputs)
        largest.append(mode.elements)
    assert largest[0] < tokens * tokens / 4
    assert largest[1] >= 2 * tokens * tokens


def test_layers_may_have_any_windows_where_hugging_face_wants_them_to_divide_the_largest():
    theirs, mine = pair("longformer", attention_window=[4, 8, 12])
    inputs = batch(theirs.config, [50, 31])
    with torch.no_grad(), pytest.raises(AssertionError, match=r"multiple of 8\. Given 60"):
        theirs(**inputs)
    padded = batch(theirs.config, [50, 31], tokens=72)  # a multiple of all three, which Hugging Face can read
    padded["input_ids"][:, :50] = inputs["input_ids"]
    with torch.no_grad():
        expected = theirs(**padded).last_hidden_state[:, :50]
        got = mine(**inputs).last_hidden_state
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1, :31], expected[1, :31], rtol=0, atol=1e-5)


def test_embeddings_as_long_as_the_position_table_work_where_hugging_face_numbers_its_own_padding_past_the_end():
    theirs, mine = pair("longformer", attention_window=[24, 24, 24])
    embeddings = torch.randn(1, MAX_TOKENS, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), pytest.raises(IndexError):
        theirs(inputs_embeds=embeddings)
    with torch.no_grad():
        assert mine(inputs_embeds=embeddings).last_hidden_state.isfinite().all()


def test_gradients_are_finite_in_half_precision_where_hugging_faces_longformer_adds_its_way_to_minus_infinity():
    theirs, _ = pair("longformer")
    with torch.no_grad():
        for layer in theirs.encoder.layer:  # all scores far below zero, which changes no softmax
            layer.attention.self.query.bias.fill_(8.0)
            layer.attention.self.key.bias.fill_(-8.0)
    theirs = theirs.half()
    mine = accelerate(copy.deepcopy(theirs))
    inputs = batch(theirs.config, [50, 3])
    finite = []
    for model in (mine, theirs):
        states = model(**inputs).last_hidden_state
        assert states.isfinite().all()
        (states * inputs["attention_mask"][..., None]).float().square().sum().backward()
        finite.append(all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None))
    assert finite == [True, False]


def test_left_padding_changes_nothing_where_hugging_faces_head_pools_a_padding_token():
    theirs, mine = pair("modernbert", "sequence_classification")  # rotary: a shift of all positions is no change
    right = batch(theirs.config, [30, 18])
    left = {name: value.clone() for name, value in right.items()}
    left["input_ids"][1] = right["input_ids"][1].roll(12)
    left["attention_mask"][1] = right["attention_mask"][1].roll(12)
    with torch.no_grad():
        torch.testing.assert_close(mine(**left).logits, mine(**right).logits, rtol=0, atol=1e-5)
        assert (theirs(**left).logits - theirs(**right).logits)[1].abs().max() > 0.01


def test_float64_is_exact_where_hugging_faces_longformer_rounds_its_probabilities_to_float32():
    exact = tiny_model("roberta").double()
    theirs = to_hugging_face_longformer(to_long(exact, max_tokens=MAX_TOKENS, window=2 * MAX_TOKENS))
    mine = accelerate(copy.deepcopy(theirs))
    inputs = batch(exact.config, [MAX_TOKENS, 31])
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = exact(**inputs).last_hidden_state[mask]
        assert (mine(**inputs).last_hidden_state[mask] - expected).abs().max() < 1e-12
        assert (theirs(**inputs).last_hidden_state[mask] - expected).abs().max() > 1e-10


def test_accelerate_is_at_the_top_of_the_package():
    assert longspan.accelerate is accelerate


def test_a_pipeline_takes_an_accelerated_model(tokenizer):
    theirs, mine = pair("bert", "sequence_classification", vocab_size=200)
    answers = [
        transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)("the zebra lives in a zoo")
        for model in (mine, theirs)
    ]
    assert answers[0][0]["label"] == answers[1][0]["label"]
    assert abs(answers[0][0]["score"] - answers[1][0]["score"]) < 1e-5


def test_roberta_under_another_name_is_accelerated():
    fields = {name: value for name, value in tiny_config("roberta").to_diff_dict().items() if name != "model_type"}
    config = XLMRobertaConfig(**fields, attn_implementation="eager")
    torch.manual_seed(0)
    theirs = AutoModel.from_config(config).eval()
    mine = accelerate(copy.deepcopy(theirs))
    inputs = batch(config, [30, 12])
    with torch.no_grad():
        assert worst_difference(mine(**inputs), theirs(**inputs), inputs["attention_mask"]) < 1e-5
