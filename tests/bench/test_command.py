import json

import pytest
import torch
from transformers.utils import logging
from typer.testing import CliRunner

from longspan.bench import peers
from longspan.cli import app
from longspan.kernels import library

ROW = {
    "case": str,
    "shape": dict,
    "system": str,
    "precision": str,
    "threads": int,
    "ours": bool,
    "status": str,
    "note": str,
    "prepare_s": float | None,
    "calls": int,
    "median_ms": float | None,
    "p20_ms": float | None,
    "p80_ms": float | None,
    "speedup": dict,
    "max_error": float | None,
    "relative_error": float | None,
    "tolerance": float | None,
    "reference": str,
    "gflops": float | None,
    "share_of_gemm": float | None,
    "peak_mib": float | None,
    "token_over_short": float | None,
}


@pytest.fixture(autouse=True)
def _nothing_else_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


def bench(*arguments):
    done = CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done


def check(result, topic):
    assert result["topic"] == f"{topic}-quick"
    assert set(result) == {"topic", "command", "commit", "date", "machine", "versions", "goals", "rows"}
    assert result["goals"] == []  # tiny sizes decide nothing
    for row in result["rows"]:
        assert set(row) == set(ROW)
        for name, kind in ROW.items():
            assert isinstance(row[name], kind), (name, row[name])
        assert (row["median_ms"] is None) == (row["status"] != "ok" or row["case"].startswith("memory"))
        assert row["status"] in ("ok", "missing", "left out", "cannot run"), row
    return {(row["case"], row["system"], row["precision"]): row for row in result["rows"]}


def test_encoder_compares_with_hugging_face_and_with_padding(tmp_path):
    done = bench("encoder", "--quick", "--threads", "1", "--json", "--out", "here/result.json")
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "here" / "result.json").read_text())
    assert result["command"] == "longspan bench encoder --threads 1 --quick"
    assert result["machine"]["threads"] == 1
    rows = check(result, "bench-encoder-large")
    for precision in ("fp32", "bf16", "int8"):
        row = rows["batch 2, 64 tokens", "longspan", precision]
        assert set(row["speedup"]) == {"Hugging Face fp32", "Hugging Face bf16"}
        case = f"3 rows of 10 to 64 tokens, {precision}"
        assert set(rows[case, "longspan", precision]["speedup"]) == {f"longspan, padding computed {precision}"}


def test_modernbert_is_compared_with_sdpa():
    rows = check(
        json.loads(bench("encoder", "--shape", "modernbert", "--quick", "--json").stdout), "bench-encoder-modernbert"
    )
    assert rows["batch 2, 64 tokens", "longspan", "bf16"]["status"] == "ok"


def test_attention_is_compared_with_every_way_in_pytorch():
    rows = check(json.loads(bench("attention", "--quick", "--memory", "--json").stdout), "bench-attention")
    names = {system for _, system, _ in rows}
    assert {"SDPA on chunks", "FlexAttention", "dense SDPA", "Hugging Face chunks", "local-attention"} <= names
    assert rows["forward, fp32", "FlexAttention", "fp32"]["status"] == "left out"
    assert "backward" in rows["forward and backward, fp32", "FlexAttention", "fp32"]["note"]
    ours = rows["forward, bf16", "longspan native", "bf16"]
    assert ours["status"] == ("ok" if library() else "cannot run")
    if ours["status"] == "ok":
        compared = rows["forward, bf16", "oneDNN GEMM", "bf16"]["status"] == "ok"  # not every CPU has bf16
        assert (ours["share_of_gemm"] is not None) == compared
        assert rows["memory, 1,024 tokens", "longspan native", "fp32"]["peak_mib"] is not None


def test_engines_that_are_missing_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda module: None)
    done = bench("dense", "--quick")
    (file,) = tmp_path.glob("*_bench-dense-quick.json")
    assert f"wrote {file.name}" in done.stderr.replace("\n", "")
    rows = check(json.loads(file.read_text()), "bench-dense")
    onnx = rows["batch 1, 32 tokens", "ONNX Runtime", "int8"]
    assert (onnx["status"], onnx["note"]) == ("missing", "pip install onnxruntime onnx")
    assert rows["batch 1, 32 tokens", "OpenVINO", "int8"]["note"] == "pip install openvino nncf"
    assert rows["batch 2 ragged, 32 tokens", "longspan", "fp32"]["status"] == "ok"
    assert "pip install openvino" in done.stdout and "missing" in done.stdout


def test_two_workers_are_compared_with_one_and_with_plain_processes(monkeypatch):
    monkeypatch.setattr(peers, "missing", lambda *modules, pip: f"pip install {pip}")
    rows = check(json.loads(bench("corpus", "--quick", "--json").stdout), "bench-corpus")
    assert rows["64 documents of 200 characters", "Ray, 1 worker", "bf16"]["note"] == "pip install 'longspan[ray]'"
    one = rows["64 documents of 200 characters", "worker pool, 1 worker", "bf16"]
    assert one["status"] == "ok" and one["speedup"]["plain processes, 1 worker bf16"] > 0


def test_a_mistake_is_told_in_one_line():
    done = CliRunner().invoke(app, ["bench", "encoder", "--tokens", "9000"])
    assert done.exit_code == 2
    assert "reads at most 4,096 tokens; got --tokens 9000" in done.stderr.replace("\n", " ")
