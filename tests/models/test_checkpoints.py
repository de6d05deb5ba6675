import pytest
import torch
from tests.models.tiny import AUTO, FAMILIES, OURS, TASKS, batch, tiny_config, tiny_model, translated
from transformers import CamembertConfig, RobertaModel, XLMRobertaConfig, XLMRobertaModel

from longspan.attention import Full, SlidingWindow
from longspan.models.checkpoints import from_hugging_face, to_hugging_face, translate_config

ALL_TASKS = (None, *TASKS)


@pytest.mark.parametrize("task", ALL_TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_go_there_and_back_bit_for_bit(family, task):
    theirs = tiny_model(family, task).state_dict()
    config = translate_config(tiny_config(family))
    ours = from_hugging_face(theirs, config, task)
    assert set(ours) == set(OURS[task](config).state_dict())
    back = to_hugging_face(ours, config, task)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_translated_config_survives_json(family, tmp_path):
    config = translate_config(tiny_config(family, id2label={0: "no", 1: "yes", 2: "maybe"}))
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert again.encoder_config == config.encoder_config
    assert again.embeddings_config == config.embeddings_config
    assert [again.head_config(task) for task in TASKS] == [config.head_config(task) for task in TASKS]
    assert again.id2label == {0: "no", 1: "yes", 2: "maybe"}


@pytest.mark.parametrize("config_class", [XLMRobertaConfig, CamembertConfig])
def test_roberta_under_another_name_is_roberta(config_class):
    fields = {name: value for name, value in tiny_config("roberta").to_dict().items() if name != "model_type"}
    config = translate_config(config_class(**fields))
    assert config.family == "roberta"
    assert config.encoder_config == translate_config(tiny_config("roberta")).encoder_config
    if config_class is XLMRobertaConfig:  # the same weight names too, prefix included
        names = XLMRobertaModel(config_class(**fields)).state_dict()
        assert set(names) == set(RobertaModel(tiny_config("roberta")).state_dict())


def test_windows_are_one_sided_here_and_total_in_hugging_face():
    longformer = translate_config(tiny_config("longformer", attention_window=[4, 8, 12])).encoder_config
    assert [block.pattern for block in longformer.blocks] == [SlidingWindow(side, side) for side in (2, 4, 6)]
    one_number = translate_config(tiny_config("longformer", attention_window=8)).encoder_config
    assert [block.pattern for block in one_number.blocks] == [SlidingWindow(4, 4)] * 3
    modernbert = translate_config(tiny_config("modernbert", local_attention=8)).encoder_config
    local = SlidingWindow(4, 4)
    assert [block.pattern for block in modernbert.blocks] == [Full(), local, local, Full()]


@pytest.mark.parametrize(
    ("family", "changes", "side"),
    [
        ("longformer", {"num_hidden_layers": 1, "attention_window": [8]}, 4),
        ("modernbert", {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "local_attention": 8}, 4),
        ("modernbert", {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "local_attention": 9}, 4),
    ],
)
@pytest.mark.parametrize("whose", ["hugging face", "longspan"])
def test_the_window_ends_at_the_same_token(family, changes, side, whose):
    model = tiny_model(family, **changes, initializer_range=0.2)
    model = translated(model) if whose == "longspan" else model
    torch.manual_seed(0)
    x = torch.randn(1, 32, 24)
    changed = x.clone()
    changed[0, 15] = torch.randn(24)
    with torch.no_grad():
        difference = model(inputs_embeds=x)[0] - model(inputs_embeds=changed)[0]
    reached = difference[0].abs().amax(-1).gt(1e-6).nonzero()[:, 0].tolist()
    assert reached == list(range(15 - side, 15 + side + 1))


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("bert", {"is_decoder": True}, "is_decoder=True"),
        ("bert", {"is_decoder": True, "add_cross_attention": True}, "is_decoder"),
        ("roberta", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("bert", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
        ("distilbert", {"activation": "mish"}, "activation='mish'"),
        ("longformer", {"autoregressive": True}, "autoregressive=True"),
        ("longformer", {"attention_dilation": [1, 1, 2]}, "attention_dilation"),
        ("modernbert", {"layer_types": ["full_attention", "chunked_attention"] * 2}, "layer_types"),
    ],
)
def test_an_option_that_we_would_compute_otherwise_is_refused_by_name(family, changes, named):
    with pytest.raises(NotImplementedError, match=named):
        translate_config(tiny_config(family, **changes))


def test_rotary_positions_other_than_the_plain_ones_are_refused():
    config = tiny_config("modernbert")
    config.rope_parameters["full_attention"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(NotImplementedError, match="rope_parameters"):
        translate_config(config)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_relative_positions_are_refused_where_hugging_face_ignores_them(family):
    config = tiny_config(family, position_embedding_type="relative_key")
    torch.manual_seed(0)
    ignoring = AUTO[None].from_config(config)
    assert not any("distance" in name for name in ignoring.state_dict())
    with pytest.raises(NotImplementedError, match="position_embedding_type='relative_key'"):
        translate_config(config)


def test_dilation_one_in_every_layer_is_no_dilation():
    assert translate_config(tiny_config("longformer", attention_dilation=[1, 1, 1])).family == "longformer"


@pytest.mark.parametrize("window", [7, 0, [4, 8]])
def test_a_longformer_window_that_cannot_be_halved_or_shared_out_is_refused(window):
    with pytest.raises(ValueError, match="attention_window must be one even number"):
        translate_config(tiny_config("longformer", attention_window=window))


def test_a_sinusoidal_table_is_read_as_the_table_it_is():
    theirs = tiny_model("distilbert", sinusoidal_pos_embds=True)
    assert torch.equal(translated(theirs).embeddings.position.weight, theirs.embeddings.position_embeddings.weight)


def test_names_that_nothing_reads_are_listed():
    config = translate_config(tiny_config("bert"))
    weights = tiny_model("bert").state_dict() | {"encoder.layer.0.adapter.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"nothing reads: encoder\.layer\.0\.adapter\.weight$"):
        from_hugging_face(weights, config)
    with pytest.raises(ValueError, match=r"a bert model has no place .* nothing reads: final_norm\.weight"):
        to_hugging_face({"final_norm.weight": torch.ones(1)}, config)


def test_a_part_that_a_fused_weight_lacks_is_listed():
    weights = tiny_model("bert").state_dict()
    del weights["encoder.layer.1.attention.self.key.weight"]
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.1\.attention\.self\.key\.weight$"):
        from_hugging_face(weights, translate_config(tiny_config("bert")))


def test_an_unknown_task_or_family_lists_those_there_are():
    config = translate_config(tiny_config("bert"))
    with pytest.raises(ValueError, match=r"unknown task 'ner'; expected one of \['masked_lm', "):
        from_hugging_face({}, config, "ner")
    config.model_type = "t5"
    with pytest.raises(NotImplementedError, match=r"no encoder for model_type 't5'; it reads bert, camembert, "):
        translate_config(config)


def test_old_files_with_buffers_and_one_of_two_tied_names_are_read():
    config = translate_config(tiny_config("bert"))
    weights = tiny_model("bert", "masked_lm").state_dict()
    bias = weights.pop("cls.predictions.decoder.bias")
    weights["bert.embeddings.position_ids"] = torch.arange(64)[None]
    assert torch.equal(from_hugging_face(weights, config, "masked_lm")["classifier.bias"], bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_happens_where_hugging_face_has_it(family):
    """With everything else off, each of the family's dropouts changes what both models compute, or neither."""
    names = {
        "distilbert": ("dropout", "attention_dropout"),
        "modernbert": ("embedding_dropout", "attention_dropout", "mlp_dropout"),
    }.get(family, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
    off = dict.fromkeys(names, 0.0)
    for name in names:
        # Dropout of all but nothing leaves the residual stream alone, whatever was drawn.
        theirs = tiny_model(family, **off | {name: 1 - 1e-7}, initializer_range=0.2)
        ours = translated(theirs)
        inputs = batch(theirs.config, [20])
        with torch.no_grad():
            expected = theirs.train()(**inputs)[0]
            assert torch.allclose(ours.train()(**inputs)[0], expected, atol=1e-5), name
