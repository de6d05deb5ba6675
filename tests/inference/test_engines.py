from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tests.models.tiny import tiny_config, tiny_model

from longspan.inference import engines, workers
from longspan.inference.engines import ENGINES, open_engine, parse_engine
from longspan.inference.onnx_model import OnnxModel
from longspan.models.checkpoints import translate_config
from longspan.models.heads import LongspanForSpanClassification
from longspan.models.quantize import quantize_checkpoint

LABELS = {"id2label": {0: "bad", 1: "good", 2: "so so"}, "label2id": {"bad": 0, "good": 1, "so so": 2}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny_model("bert", "sequence_classification", num_hidden_layers=2, **LABELS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    model.save_pretrained(folder)
    return folder


BATCH = {
    "input_ids": np.array([[7, 8, 9, 10, 11], [12, 13, 14, 0, 0]]),
    "attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "token_type_ids": np.array([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]),
}


@pytest.fixture
def expected(checkpoint):
    with open_engine(checkpoint, "huggingface") as engine:
        return engine.logits(BATCH)


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        ("longspan", "fp32", 1e-5),
        ("longspan", "bf16", 0.05),
        ("longspan", "int8", 0.05),
        ("onnx", "fp32", 1e-5),
        ("onnx", "int8", 0.1),
    ],
)
def test_all_engines_give_the_same_logits(checkpoint, expected, name, precision, tolerance):
    if name == "onnx":
        pytest.importorskip("onnxruntime", reason="needs pip install longspan[onnx]")
    before = torch.get_num_threads()
    with open_engine(checkpoint, name, precision=precision) as engine:
        found = engine.logits(BATCH)
        assert (engine.name, engine.precision) == (name, precision)
    assert torch.get_num_threads() == before
    assert found.dtype == np.float32 and np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    assert (name, precision) == ("longspan", "fp32") or np.abs(found - expected).max() > 0


def test_instances_answer_from_several_threads(checkpoint, expected, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs pip install longspan[onnx]")
    cores = (workers.allowed_cores() * 2)[:2]
    for module in (workers, engines):
        monkeypatch.setattr(module, "allowed_cores", lambda: cores)
    for name in ("longspan", "onnx"):
        with open_engine(checkpoint, name, instances=2) as engine, ThreadPoolExecutor(4) as threads:
            found = list(threads.map(engine.logits, [BATCH] * 4))
        for logits in found:
            np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_packed_checkpoints_and_span_models_run_on_longspan(checkpoint, expected, tmp_path):
    quantize_checkpoint(checkpoint, tmp_path / "packed")
    with open_engine(tmp_path / "packed") as engine:
        assert engine.precision == "int8"
        assert np.abs(engine.logits(BATCH) - expected).max() < 0.05 * np.abs(expected).max()
    for name, precision in (("onnx", None), ("longspan", "fp32")):
        with (
            pytest.raises(ValueError, match=r"packed in int8 .*: name the checkpoint that it was made of"),
            open_engine(tmp_path / "packed", name, precision=precision),
        ):
            pass
    LongspanForSpanClassification(translate_config(tiny_config("bert", num_hidden_layers=1))).save_pretrained(
        tmp_path / "spans"
    )
    with open_engine(tmp_path / "spans") as engine:
        assert engine.logits(BATCH | {"span_ranges": np.array([[[0, 2], [2, 3]]] * 2)}).shape == (2, 2)
    with (
        pytest.raises(NotImplementedError, match="is a longspan model, which transformers' classes cannot load"),
        open_engine(tmp_path / "spans", "huggingface"),
    ):
        pass


def test_a_file_of_export_is_run_as_it_is(checkpoint, expected, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs pip install longspan[onnx]")
    from longspan.inference.export_onnx import export

    file = export(checkpoint, tmp_path / "model.onnx").out
    assert OnnxModel(file, threads=1).labels == ("bad", "good", "so so")
    with open_engine(checkpoint, "onnx", onnx_file=file) as engine:
        np.testing.assert_allclose(engine.logits(BATCH), expected, atol=1e-5)
    with (
        pytest.raises(ValueError, match="is in fp32, and int8 was asked for"),
        open_engine(checkpoint, "onnx", precision="int8", onnx_file=file),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensorrt", "no engine 'tensorrt'; there are huggingface, longspan, onnx"),
        ("onnx:bf16", "onnx computes in fp32, int8; got 'bf16'"),
        ("huggingface:int8", "huggingface computes in fp32; got 'int8'"),
    ],
)
def test_engines_that_do_not_exist_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_engine(text)


def test_engines_are_written_with_or_without_a_precision():
    assert parse_engine("longspan") == ("longspan", None)
    for name, precisions in ENGINES.items():
        assert all(parse_engine(f"{name}:{precision}") == (name, precision) for precision in precisions)


def test_more_threads_than_cores_are_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(engines, "allowed_cores", lambda: [0, 1, 2])
    for wrong in ({"instances": 2, "threads_per_instance": 2}, {"instances": 0}, {"threads_per_instance": 0}):
        with pytest.raises(ValueError, match="at most the 3 cores"), open_engine(checkpoint, **wrong):
            pass
