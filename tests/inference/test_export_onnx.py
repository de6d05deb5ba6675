import json
import sys

import numpy as np
import pytest
import torch
from tests.models.tiny import OURS, batch, tiny_config, tiny_model, translated

from longspan.attention import DilatedSegments, Full, SlidingWindow
from longspan.compression.ngrams import with_ngrams
from longspan.models.checkpoints import translate_config
from longspan.models.config import LongspanConfig
from longspan.models.embeddings import EmbeddingsConfig
from longspan.models.encoder import BlockConfig, EncoderConfig
from longspan.models.evidence import LongspanForEvidence
from longspan.models.heads import LongspanForSequenceClassification, LongspanForSpanClassification
from longspan.models.model import LongspanModel
from longspan.models.plug_in import accelerate

onnx = pytest.importorskip("onnx", reason="needs pip install longspan[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install longspan[onnx]")

from longspan.inference import export_onnx  # noqa: E402
from longspan.inference.export_onnx import export  # noqa: E402
from longspan.inference.onnx_model import OnnxModel  # noqa: E402

SMALL = {"bert": {"num_hidden_layers": 2}, "roberta": {"num_hidden_layers": 2}, "distilbert": {"n_layers": 2}}
SMALL |= {"longformer": {"num_hidden_layers": 2, "attention_window": [4, 16]}, "modernbert": {"num_hidden_layers": 3}}


def loud(model):
    """Weights so large that a wrong mask shows in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.eval()


def model_of(family, task):
    return loud(translated(tiny_model(family, task, **SMALL[family]), task))


def model_of_blocks(*blocks, kind=LongspanModel, **fields):
    """A model of odd layers that numbers no positions, so any length fits."""
    torch.manual_seed(0)
    config = LongspanConfig(
        embeddings=EmbeddingsConfig(vocab_size=50, width=12).to_dict(),
        encoder=EncoderConfig(width=12, blocks=blocks, **fields).to_dict(),
        num_labels=3,
    )
    return loud(kind(config))


def differences(model, onnx_model, inputs):
    with torch.no_grad():
        expected = model(**inputs)
    found = onnx_model(**inputs)
    is_token = inputs["attention_mask"].bool()
    for name in onnx_model.outputs:
        wanted, got = expected[name], torch.from_numpy(found[name])
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        if wanted.shape[: is_token.dim()] == is_token.shape:
            wanted, got = wanted[is_token], got[is_token]
        assert wanted.abs().max() > 1e-3
        yield float((wanted - got).abs().max())


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("bert", "sequence_classification"),
        ("roberta", "masked_lm"),
        ("distilbert", "token_classification"),
        ("longformer", "question_answering"),
        ("longformer", "sequence_classification"),
        ("bert", "multiple_choice"),
        ("modernbert", None),
    ],
)
def test_one_file_gives_the_modules_outputs_for_any_batch_length_padding_and_globals(tmp_path, family, task):
    model = model_of(family, task)
    done = export(model, tmp_path / "model.onnx")
    assert done.difference < 1e-4 and done.size == (tmp_path / "model.onnx").stat().st_size
    onnx_model = OnnxModel(done.out, threads=1)
    assert onnx_model.task == task and onnx_model.precision == "fp32"
    for lengths, tokens in (([16], 16), ([32, 9, 1], 32), ([21, 20], 23), ([64], 64), ([1], 1)):
        for global_tokens in (None, 0, 3):
            inputs = batch(model.config, lengths, tokens)
            if model.config.sep_token_id is not None:
                inputs["input_ids"][:, 1:3] = model.config.sep_token_id
            if global_tokens is not None and "global_attention_mask" in onnx_model.inputs:
                marked = (torch.arange(tokens) % 5 == 0) & (torch.arange(tokens) < 5 * global_tokens)
                inputs["global_attention_mask"] = marked.long().expand(len(lengths), -1).clone()
                inputs["global_attention_mask"][1:] = 0
            elif tokens < 3 and task in ("question_answering", "multiple_choice"):
                continue  # no separator, by which these heads choose
            if task == "multiple_choice":
                inputs = {name: part[None] for name, part in inputs.items()}
            assert max(differences(model, onnx_model, inputs)) < 1e-4


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_pruned_layers_of_different_widths_and_uncommon_windows_have_a_graph(tmp_path, norm):
    model = model_of_blocks(
        BlockConfig(heads=3, head_width=4, ffn_width=5, pattern=SlidingWindow(5, 2), global_projections=True),
        BlockConfig(heads=1, head_width=6, ffn_width=1, pattern=SlidingWindow(3, 0, 2), rope_theta=100.0),
        BlockConfig(heads=2, head_width=2, ffn_width=9, pattern=Full(), global_projections=True, rope_theta=10.0),
        BlockConfig(heads=2, head_width=3, ffn_width=2, pattern=SlidingWindow(0, 140, (1, 1))),
        norm=norm,
        gated=norm == "pre",
        activation="relu",
    )
    onnx_model = OnnxModel(export(model, tmp_path / "model.onnx").out, threads=1)
    for lengths in ([7, 3], [300], [150, 1, 149]):
        inputs = batch(model.config, lengths) | {
            "global_attention_mask": (torch.arange(max(lengths)) % 7 == 2).long().expand(len(lengths), -1)
        }
        assert max(differences(model, onnx_model, inputs)) < 1e-4


def test_ngrams_have_a_graph(tmp_path):
    table = torch.randn(53, 3, generator=torch.Generator().manual_seed(0))
    block = BlockConfig(heads=2, head_width=6, ffn_width=8)
    model = with_ngrams(model_of_blocks(block, kind=LongspanForSequenceClassification), table)
    for precision, tolerance in (("fp32", 1e-4), ("int8", 0.2)):
        done = export(model, tmp_path / precision, precision=precision)
        for lengths in ([16], [30, 1, 7], [1]):
            found = differences(model, OnnxModel(done.out, threads=1), batch(model.config, lengths))
            assert max(found) < tolerance


def test_spans_have_a_graph(tmp_path):
    torch.manual_seed(0)
    model = loud(LongspanForSpanClassification(translate_config(tiny_config("longformer", **SMALL["longformer"]))))
    onnx_model = OnnxModel(export(model, tmp_path / "model.onnx").out, threads=1)
    inputs = batch(model.config, [30, 12]) | {"span_ranges": torch.tensor([[[3, 5], [20, 30]], [[0, 1], [11, 12]]])}
    assert max(differences(model, onnx_model, inputs)) < 1e-4
    with pytest.raises(ValueError, match="give span_ranges"):
        onnx_model(inputs["input_ids"])


def test_no_tensor_of_a_window_grows_faster_than_the_input(tmp_path):
    block = BlockConfig(heads=2, head_width=6, ffn_width=8, pattern=SlidingWindow(8, 8), global_projections=True)
    export(model_of_blocks(block), tmp_path / "model.onnx")

    def largest(tokens):
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
        session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options)
        ids = np.ones((1, tokens), dtype=np.int64)
        is_global = (np.arange(tokens) < 3).astype(np.int64)[None]
        session.run(None, {"input_ids": ids, "attention_mask": ids, "global_attention_mask": is_global})
        with open(session.end_profiling()) as profile:
            return max(int(event.get("args", {}).get("output_size", 0)) for event in json.load(profile))

    few, many = largest(512), largest(4096)
    assert 0 < many <= 8.1 * few


def test_what_is_left_out_is_what_the_head_chooses(tmp_path):
    model = model_of("longformer", "sequence_classification")
    file = export(model, tmp_path / "model.onnx").out
    ids = batch(model.config, [40])["input_ids"].numpy()
    ones, zeros = np.ones_like(ids), np.zeros_like(ids)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    plain = onnxruntime.InferenceSession(str(file), options)  # as a program that knows nothing of global tokens
    assert [part.name for part in plain.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    (chosen,) = plain.run(None, {"input_ids": ids, "attention_mask": ones, "token_type_ids": zeros})
    onnx_model = OnnxModel(file, threads=1)
    first = zeros.copy()
    first[:, 0] = 1
    np.testing.assert_allclose(onnx_model(ids)["logits"], chosen, atol=1e-6)
    np.testing.assert_allclose(onnx_model(ids, global_attention_mask=first)["logits"], chosen, atol=1e-6)
    assert np.abs(onnx_model(ids, global_attention_mask=zeros)["logits"] - chosen).max() > 1e-3


def test_int8_quantizes_the_encoders_matrices_by_channel_and_nothing_else(tmp_path):
    model = model_of("longformer", "sequence_classification")
    done = export(model, tmp_path / "model.onnx", precision="int8", reduce_range=False)
    onnx_model = OnnxModel(done.out, threads=1)
    assert onnx_model.precision == "int8" and onnx_model.labels == ("LABEL_0", "LABEL_1")
    proto = onnx.load(str(done.out))
    int8 = [part for part in proto.graph.initializer if part.data_type == onnx.TensorProto.INT8 and len(part.dims) == 2]
    blocks = model.config.encoder_config.blocks
    assert len(int8) == 4 * len(blocks)
    scales = {part.name: part for part in proto.graph.initializer if part.name.endswith("_scale")}
    for part in int8:
        assert list(scales[part.name.replace("_quantized", "_scale")].dims) == [part.dims[1]]
        assert abs(onnx.numpy_helper.to_array(part)).max() == 127
    inputs = batch(model.config, [50, 31])
    assert 0 < max(differences(model, onnx_model, inputs)) < 0.2
    with torch.no_grad():
        assert np.array_equal(model(**inputs).logits.argmax(-1), onnx_model(**inputs)["logits"].argmax(-1))


def test_seven_bits_where_the_processor_needs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "_needs_reduced_range", lambda: True)
    file = export(model_of("bert", None), tmp_path / "model.onnx", precision="int8").out
    parts = [part for part in onnx.load(str(file)).graph.initializer if part.data_type == onnx.TensorProto.INT8]
    assert max(abs(onnx.numpy_helper.to_array(part)).max() for part in parts if len(part.dims) == 2) == 64


def test_checkpoints_of_other_families_are_exported_from_their_directory(tmp_path):
    theirs = tiny_model("distilbert", "question_answering", n_layers=1)
    theirs.save_pretrained(tmp_path / "theirs")
    done = export(tmp_path / "theirs", tmp_path / "model.onnx")
    assert done.architecture == "LongspanForQuestionAnswering" and done.inputs == ("input_ids", "attention_mask")
    inputs = batch(theirs.config, [33])
    with torch.no_grad():
        expected = theirs(**inputs)
    found = OnnxModel(done.out, threads=1)(**inputs)
    np.testing.assert_allclose(found["start_logits"], expected.start_logits, atol=1e-4)
    np.testing.assert_allclose(found["end_logits"], expected.end_logits, atol=1e-4)


def test_a_model_in_another_dtype_and_in_training_is_left_as_it_was(tmp_path):
    model = model_of("bert", None).bfloat16().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    export(model, tmp_path / "model.onnx")
    assert model.training and [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


BLOCK = BlockConfig(heads=2, head_width=6, ffn_width=8)


@pytest.mark.parametrize(
    ("pattern", "shown"),
    [
        (Full(causal=True), r"Full\(causal=True\)"),
        (SlidingWindow(2, 2, (1, 2)), r"dilation=\(1, 2\)"),
        (DilatedSegments(((4, 1),), heads=2), "DilatedSegments"),
    ],
)
def test_patterns_without_a_graph_are_refused_by_layer(tmp_path, pattern, shown):
    model = model_of_blocks(BLOCK, BlockConfig(heads=2, head_width=6, ffn_width=8, pattern=pattern))
    with pytest.raises(NotImplementedError, match=f"layer 1 sees by .*{shown}"):
        export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_models_that_have_no_graph_are_refused_with_the_way_out(tmp_path):
    out = tmp_path / "model.onnx"
    config = model_of_blocks(BLOCK).config
    with pytest.raises(NotImplementedError, match="LongspanForEvidence has no ONNX graph; those that have"):
        export(LongspanForEvidence(config), out)
    with pytest.raises(ValueError, match="got BertModel: load it with"):
        export(tiny_model("bert"), out)
    with pytest.raises(ValueError, match=r"packed in int8 .*: export the model that it was made of"):
        export(accelerate(model_of_blocks(BLOCK), "int8"), out)
    with pytest.raises(ValueError, match="sep_token_id is None"):
        model = model_of("longformer", "question_answering")
        model.config.sep_token_id = None
        export(model, out)
    with pytest.raises(ValueError, match="'fp32' or 'int8'; got 'bf16'"):
        export(model_of_blocks(BLOCK), out, precision="bf16")
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="exists"):
        export(model_of_blocks(BLOCK), out)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


def test_a_graph_that_differs_from_the_module_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, "TOLERANCE", 1e-12)
    with pytest.raises(RuntimeError, match="the exported graph is wrong: last_hidden_state of"):
        export(model_of_blocks(BLOCK), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime is not installed; pip install longspan\[onnx\]"):
        export(model_of_blocks(BLOCK), tmp_path / "model.onnx")
    with pytest.raises(ImportError, match=r"pip install longspan\[onnx\]"):
        OnnxModel(tmp_path / "model.onnx")


def test_the_runner_says_what_is_wrong_with_file_and_inputs(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no file"):
        OnnxModel(tmp_path / "model.onnx")
    (tmp_path / "other.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="not a model that `longspan export` wrote"):
        OnnxModel(tmp_path / "other.onnx")
    model = OnnxModel(export(model_of("bert", None), tmp_path / "model.onnx").out, threads=1)
    with pytest.raises(ValueError, match="positions for 65 tokens and this model has 64"):
        model(np.ones((1, 65)))
    with pytest.raises(ValueError, match=r"no input \['global_attention_mask'\]; its inputs are input_ids, attention"):
        model(np.ones((1, 4)), global_attention_mask=np.ones((1, 4)))
    with pytest.raises(ValueError, match=r"all inputs must be \[B, N\], alike and not empty"):
        model(np.ones((1, 4)), attention_mask=np.ones((1, 5)))
    with pytest.raises(ValueError, match="not empty"):
        model(np.ones((1, 0)))


def test_every_kind_of_model_in_the_table_is_one_of_ours():
    assert {kind for kind in OURS.values()} | {LongspanForSpanClassification} == set(export_onnx.KINDS)
    assert LongspanForSequenceClassification in export_onnx.KINDS
