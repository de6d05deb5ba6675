import copy
import json

import pytest
import torch
from tests.models.tiny import MAX_TOKENS, TASKS, batch, tiny_model, translated
from torch import nn
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForNextSentencePrediction, LongformerModel

import longspan
from longspan.attention import SlidingWindow
from longspan.models import LongspanForMaskedLM, LongspanForSequenceClassification, LongspanModel
from longspan.models.convert import (
    convert_checkpoint,
    recopy_global_projections,
    to_hugging_face_longformer,
    to_long,
)
from longspan.models.sequence import WholeSequence

SHORT = ("bert", "roberta", "distilbert")
OFFSET = {"bert": 0, "roberta": 2, "distilbert": 0}
CAN_SEPARATE = {"sep_token_id": 4}
LONGFORMER_HEADS = [  # DistilBERT's two pooled heads are its own
    (family, task)
    for family in SHORT
    for task in (None, *TASKS)
    if family != "distilbert" or task not in ("sequence_classification", "multiple_choice")
]


def outputs(model, inputs, **options):
    """The first output, [rows, ...], at tokens only where it has tokens."""
    with torch.no_grad():
        out = model(**inputs, **options)
    first = out[0]
    mask = inputs["attention_mask"].bool()
    return first[mask] if first.shape[: mask.dim()] == mask.shape else first


def inputs_for(model, task, lengths, **options):
    inputs = batch(model.config, lengths, **options)
    if task == "multiple_choice":
        inputs = {name: value[:, None].expand(-1, 2, -1).clone() for name, value in inputs.items()}
        inputs["input_ids"][:, 1] = torch.where(inputs["attention_mask"][:, 1] == 1, 7, inputs["input_ids"][:, 1])
    inputs["input_ids"][..., 3] = 4  # a separator, for the heads that look for one
    return inputs


@pytest.mark.parametrize("task", [None, *TASKS])
@pytest.mark.parametrize("family", SHORT)
def test_where_the_window_covers_the_input_it_equals_the_original(family, task):
    model = tiny_model(family, task, **CAN_SEPARATE).double()
    long = to_long(model, max_tokens=200, window=2 * MAX_TOKENS)
    inputs = inputs_for(model, task, [MAX_TOKENS, 41, 5])
    expected = outputs(model, inputs)
    torch.testing.assert_close(outputs(long, inputs), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs(long.float(), inputs), expected.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("max_tokens", [1, 30, MAX_TOKENS, MAX_TOKENS + 1, 150, 4 * MAX_TOKENS])
@pytest.mark.parametrize("family", SHORT)
def test_position_rows_repeat_to_any_length_and_those_below_the_offset_are_copied_too(family, max_tokens):
    model = tiny_model(family)
    old = model.embeddings.position_embeddings.weight
    new = to_long(model, max_tokens=max_tokens, window=8).embeddings.position.weight
    offset = OFFSET[family]
    assert len(new) == offset + max_tokens
    assert torch.equal(new[:offset], old[:offset])
    for position in range(max_tokens):
        assert torch.equal(new[offset + position], old[offset + position % MAX_TOKENS])


@pytest.mark.parametrize("family", SHORT)
def test_it_reads_as_many_tokens_as_asked_and_then_names_to_long(family):
    model = tiny_model(family)
    long = to_long(model, max_tokens=150, window=8)
    assert long.config.embeddings_config.max_tokens == 150
    assert outputs(long, batch(model.config, [150, 1])).isfinite().all()
    with pytest.raises(ValueError, match=r"151 tokens.* 150: .*to_long\(model, max_tokens=151\)"):
        outputs(long, batch(model.config, [151]))


@pytest.mark.parametrize("family", SHORT)
def test_periodic_positions_equal_a_copied_table_and_never_end(family):
    model = tiny_model(family)
    periodic, copied = (to_long(model, max_tokens=tokens, window=8) for tokens in (None, 200))
    inputs = batch(model.config, [200, 77])
    assert torch.equal(outputs(periodic, inputs), outputs(copied, inputs))
    assert torch.equal(
        periodic.embeddings.position.weight, model.embeddings.position_embeddings.weight
    )  # no row was added
    assert outputs(periodic, batch(model.config, [1500])).isfinite().all()
    assert torch.equal(outputs(to_long(periodic, max_tokens=200, window=8), inputs), outputs(copied, inputs))


def test_a_padded_batch_of_a_long_roberta_reads_no_uninitialized_row():
    model = tiny_model("roberta")
    padded = outputs(to_long(model, max_tokens=100, window=8), batch(model.config, [90, 3], tokens=100))
    assert padded.isfinite().all()


def test_window_is_the_total_of_both_sides():
    model = tiny_model("bert")
    long = to_long(model, max_tokens=100, window=8)
    x = torch.randn(1, 100, 24, requires_grad=True)
    long.encoder.blocks[0](x, WholeSequence().place(x, None), None, None, "auto")[0, 50].sum().backward()
    assert x.grad[0].abs().sum(1).nonzero()[:, 0].tolist() == list(range(46, 55))


def test_each_layer_may_have_a_window_of_its_own():
    long = to_long(tiny_model("bert"), max_tokens=100, window=[4, 8, 10])
    assert [block.pattern for block in long.config.encoder_config.blocks] == [
        SlidingWindow(2, 2),
        SlidingWindow(4, 4),
        SlidingWindow(5, 5),
    ]


@pytest.mark.parametrize("window", [0, -2, 7, [4, 8], [4, 8, 5]])
def test_windows_that_do_not_fit_are_refused(window):
    with pytest.raises(ValueError, match=r"even number of tokens >= 2.*one for each of the 3 layers"):
        to_long(tiny_model("bert"), window=window)


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_lengths_below_one_are_refused(max_tokens):
    with pytest.raises(ValueError, match="max_tokens must be at least 1, or None"):
        to_long(tiny_model("bert"), max_tokens=max_tokens)


def test_global_projections_start_as_copies_that_share_no_memory():
    model = tiny_model("roberta")
    before = copy.deepcopy(model.state_dict())
    long = to_long(model, max_tokens=100, window=8)
    for block in long.encoder.blocks:
        assert torch.equal(block.attention.qkv.weight, block.attention.qkv_global.weight)
        assert torch.equal(block.attention.qkv.bias, block.attention.qkv_global.bias)
    with torch.no_grad():
        for name, parameter in long.named_parameters():
            if "qkv_global" not in name:
                parameter.zero_()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    layer = model.encoder.layer[0].attention.self
    together = torch.cat((layer.query.weight, layer.key.weight, layer.value.weight))
    assert torch.equal(long.encoder.blocks[0].attention.qkv_global.weight, together)


def test_masked_language_modeling_leaves_the_global_projections_behind_until_they_are_copied_again():
    long = to_long(tiny_model("bert", "masked_lm"), max_tokens=100, window=8)
    inputs = batch(long.config, [90, 50])
    long(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer = torch.optim.SGD(long.parameters(), lr=1.0)
    optimizer.step()
    attention = long.longspan.encoder.blocks[1].attention
    assert attention.qkv_global.weight.grad is None
    assert not torch.equal(attention.qkv_global.weight, attention.qkv.weight)
    recopy_global_projections(long)
    for block in long.longspan.encoder.blocks:
        assert torch.equal(block.attention.qkv_global.weight, block.attention.qkv.weight)
        assert torch.equal(block.attention.qkv_global.bias, block.attention.qkv.bias)
    assert attention.qkv_global.weight.data_ptr() != attention.qkv.weight.data_ptr()


def test_a_dense_model_has_no_global_projections_to_copy():
    with pytest.raises(ValueError, match=r"LongspanModel has no global projections.*to_long"):
        recopy_global_projections(translated(tiny_model("bert")))


def test_token_types_are_kept():
    model = tiny_model("bert", type_vocab_size=3)
    long = to_long(model, max_tokens=100, window=128)
    inputs = batch(model.config, [50]) | {"token_type_ids": torch.arange(50)[None] % 3}
    torch.testing.assert_close(outputs(long, inputs), outputs(model, inputs), rtol=0, atol=2e-6)


def test_task_heads_make_the_tokens_global_that_a_longformer_would():
    long = to_long(tiny_model("bert", "sequence_classification", **CAN_SEPARATE), max_tokens=100, window=4)
    tokens = {task: long.config.head_config(task).global_tokens for task in TASKS}
    assert tokens == {
        "masked_lm": None,
        "sequence_classification": "first",
        "token_classification": None,
        "question_answering": "before_separator",
        "multiple_choice": "after_separator",
    }
    inputs = batch(long.config, [90])
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][0, 80] = 9  # further from the first token than three layers of two tokens reach
    assert not torch.equal(outputs(long, inputs), outputs(long, changed))


def test_without_a_separator_id_question_answering_needs_no_separator():
    model = tiny_model("bert", "question_answering")
    long = to_long(model, max_tokens=100, window=128)
    inputs = batch(model.config, [50])
    torch.testing.assert_close(outputs(long, inputs), outputs(model, inputs), rtol=0, atol=2e-6)


def test_our_own_model_and_a_directory_convert_like_the_hugging_face_model(tmp_path):
    model = tiny_model("roberta", "sequence_classification")
    model.save_pretrained(tmp_path)
    expected = to_long(model, max_tokens=100, window=8).state_dict()
    for source in (translated(model, "sequence_classification"), tmp_path, str(tmp_path)):
        long = to_long(source, max_tokens=100, window=8)
        assert type(long) is LongspanForSequenceClassification
        assert all(torch.equal(long.state_dict()[name], expected[name]) for name in expected)


def test_a_base_model_without_pooler_stays_without():
    model = tiny_model("bert")
    model.pooler = None
    long = to_long(model, max_tokens=100, window=8)
    assert long.pooler is None
    assert not long.config.pooler


def test_a_longformer_becomes_longer_and_keeps_its_global_projections():
    model = tiny_model("longformer", attention_window=[8, 8, 8])
    long = to_long(model, max_tokens=100, window=8)
    layer = model.encoder.layer[0].attention.self
    together = torch.cat((layer.query_global.weight, layer.key_global.weight, layer.value_global.weight))
    assert torch.equal(long.encoder.blocks[0].attention.qkv_global.weight, together)
    inputs = batch(model.config, [61, 40]) | {"global_attention_mask": torch.eye(61, dtype=torch.long)[[5, 33]]}
    torch.testing.assert_close(outputs(long, inputs), outputs(model, inputs), rtol=0, atol=2e-6)


def test_modernbert_has_no_positions_to_lengthen():
    with pytest.raises(ValueError, match=r"no position table.*rotary.*reads any length as it is"):
        to_long(tiny_model("modernbert"))


def test_a_head_that_longspan_lacks_is_named():
    config = tiny_model("bert").config
    with pytest.raises(NotImplementedError, match=r"BertForNextSentencePrediction.*MaskedLM.*SequenceClassification"):
        to_long(BertForNextSentencePrediction(config))


def test_dtype_and_mode_are_kept():
    model = tiny_model("bert").bfloat16().train()
    long = to_long(model, max_tokens=100, window=8)
    assert {parameter.dtype for parameter in long.parameters()} == {torch.bfloat16}
    assert long.training


@pytest.mark.parametrize("max_tokens", [150, None])
def test_it_saves_and_loads(tmp_path, max_tokens):
    model = tiny_model("roberta", "masked_lm")
    long = to_long(model, max_tokens=max_tokens, window=[4, 8, 12])
    long.save_pretrained(tmp_path)
    for kind in (LongspanForMaskedLM, AutoModelForMaskedLM):
        again = kind.from_pretrained(tmp_path)
        inputs = batch(model.config, [140, 60])
        assert type(again) is LongspanForMaskedLM
        assert torch.equal(outputs(again, inputs), outputs(long, inputs))


@pytest.mark.parametrize(("family", "task"), LONGFORMER_HEADS)
def test_the_stock_longformer_that_it_writes_gives_the_same_outputs(tmp_path, family, task):
    long = to_long(tiny_model(family, task), max_tokens=150, window=[4, 8, 16])
    to_hugging_face_longformer(long).save_pretrained(tmp_path)
    architecture = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    assert architecture.startswith("Longformer")
    stock, report = getattr(__import__("transformers"), architecture).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not report["unexpected_keys"]
    assert all(name.startswith("pooler.") for name in report["missing_keys"])  # DistilBERT has none
    inputs = inputs_for(long, task, [130, 77, 3])
    global_mask = torch.rand(inputs["input_ids"].shape, generator=torch.Generator().manual_seed(0)) < 0.1
    for chosen in (torch.zeros_like(global_mask), global_mask):
        inputs["global_attention_mask"] = chosen.long()
        torch.testing.assert_close(outputs(stock, inputs), outputs(long, inputs), rtol=0, atol=1e-5)


def test_the_stock_longformer_of_a_bert_has_its_position_table_shifted_behind_the_padding_row():
    long = to_long(tiny_model("bert"), max_tokens=150, window=8)
    stock = to_hugging_face_longformer(long)
    assert stock.config.max_position_embeddings == 151
    assert stock.config.type_vocab_size == 2
    assert stock.config.attention_window == [8, 8, 8]
    table = stock.embeddings.position_embeddings.weight
    assert torch.equal(table[1:], long.embeddings.position.weight)
    assert not table[0].any()


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda: to_long(tiny_model("roberta"), max_tokens=None), "position table with an end.*max_tokens=N"),
        (lambda: translated(tiny_model("roberta")), "windows with two equal sides"),
        (
            lambda: to_long(tiny_model("distilbert", "sequence_classification")),
            "cannot express.*head activation: 'relu', Longformer's 'tanh'",
        ),
        (
            lambda: to_long(tiny_model("bert", "masked_lm", hidden_act="relu")),
            "head activation: 'relu', Longformer's 'gelu'",
        ),
    ],
)
def test_what_a_stock_longformer_cannot_express_is_refused(convert, message):
    with pytest.raises(NotImplementedError, match=message):
        to_hugging_face_longformer(convert())


def save_checkpoint(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(64)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("max_tokens", [150, None])
def test_convert_checkpoint_writes_model_and_tokenizer_for_the_new_length(tmp_path, tokenizer, max_tokens):
    source, out = tmp_path / "short", tmp_path / "new" / "long"
    model = tiny_model("bert", "question_answering")
    save_checkpoint(model, tokenizer, source)
    report = convert_checkpoint(source, out, max_tokens=max_tokens, window=8)
    assert report.architecture == "LongspanForQuestionAnswering"
    assert (report.trained_tokens, report.max_tokens, report.windows) == (64, max_tokens, (8, 8, 8))
    assert report.parameters > model.num_parameters()
    assert report.has_tokenizer

    long = longspan.LongspanForQuestionAnswering.from_pretrained(out)
    again = AutoTokenizer.from_pretrained(out)
    assert again.model_max_length == max_tokens or (max_tokens is None and again.model_max_length > 10**9)
    assert again.backend_tokenizer.truncation is None
    assert again.backend_tokenizer.padding is None
    assert long.config.sep_token_id == again.sep_token_id == 3
    inputs = again("what zebra", "the zebra " * 60, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 125
    assert outputs(long, inputs).isfinite().all()
    assert [path.name for path in out.parent.iterdir()] == ["long"]


def test_convert_checkpoint_writes_a_stock_longformer_when_asked(tmp_path, tokenizer):
    source, out = tmp_path / "short", tmp_path / "long"
    save_checkpoint(tiny_model("roberta"), tokenizer, source)
    report = convert_checkpoint(source, out, max_tokens=100, window=8, format="huggingface")
    assert report.architecture == "LongformerModel"
    stock = LongformerModel.from_pretrained(out)
    ours = LongspanModel.from_pretrained(out)
    inputs = batch(stock.config, [96])
    torch.testing.assert_close(outputs(stock, inputs), outputs(ours, inputs), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out).model_max_length == 100


def test_convert_checkpoint_reads_the_masked_lm_of_a_pretraining_checkpoint_without_tokenizer(tmp_path):
    model = tiny_model("bert", "masked_lm")
    model.save_pretrained(tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text()) | {"architectures": ["BertForPreTraining"]}
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    report = convert_checkpoint(str(tmp_path / "short"), str(tmp_path / "long"), max_tokens=100, window=128)
    assert report.architecture == "LongspanForMaskedLM"
    assert not report.has_tokenizer
    inputs = batch(model.config, [50])
    long = LongspanForMaskedLM.from_pretrained(tmp_path / "long")
    torch.testing.assert_close(outputs(long, inputs), outputs(model, inputs), rtol=0, atol=2e-6)


def test_convert_checkpoint_never_overwrites(tmp_path):
    source, out = tmp_path / "short", tmp_path / "long"
    tiny_model("bert").save_pretrained(source)
    out.mkdir()
    convert_checkpoint(source, out, max_tokens=100, window=8)  # an empty directory is no obstacle
    written = (out / "config.json").read_bytes()
    for taken in (out, out / "config.json", source):
        with pytest.raises(FileExistsError, match="exists and is not an empty directory"):
            convert_checkpoint(source, taken, max_tokens=50, window=8)
    assert (out / "config.json").read_bytes() == written


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    source, out = tmp_path / "short", tmp_path / "long"
    tiny_model("bert").save_pretrained(source)

    def write_half_and_fail(self, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(LongspanModel, "save_pretrained", write_half_and_fail)
    with pytest.raises(OSError, match="disk full"):
        convert_checkpoint(source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["short"]


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'longspan' or 'huggingface'; got 'onnx'"):
        convert_checkpoint(tmp_path, tmp_path / "out", format="onnx")


def test_to_long_is_at_the_top_of_the_package():
    assert longspan.to_long is to_long
    assert isinstance(to_long(tiny_model("bert"), window=2), nn.Module)
