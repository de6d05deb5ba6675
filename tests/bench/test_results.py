import json
import subprocess

import pytest

from longspan.bench import results


@pytest.fixture
def result(monkeypatch):
    monkeypatch.setattr(
        results,
        "_cpuinfo",
        lambda: {"model name": "Intel(R) Xeon(R) Gold 6330 CPU @ 2.00GHz", "flags": "fpu avx2 avx512f nx"},
    )
    monkeypatch.setattr(results, "_kernels_instruction_set", lambda: "avx512_bf16")
    return results.document("bench-dense", "longspan bench dense", [{"relative_error": float("nan"), "calls": 3}], [])


def test_a_result_says_where_and_with_what_it_was_measured(result):
    machine, versions = result["machine"], result["versions"]
    assert machine["cpu"] == "Intel(R) Xeon(R) Gold 6330 CPU @ 2.00GHz"
    assert machine["instruction_set"] == "avx512_bf16" and machine["instructions"] == ["avx2", "avx512f"]
    assert machine["cores"] >= 1 and machine["threads"] >= 1
    assert {"python", "torch", "transformers", "longspan", "onnxruntime", "openvino", "local-attention"} <= set(
        versions
    )
    assert len(result["date"]) == 10


def test_numbers_that_json_lacks_become_null(result):
    assert json.loads(results.to_json(result))["rows"] == [{"relative_error": None, "calls": 3}]


def test_the_file_is_named_after_date_cpu_and_topic(result, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"{result['date']}_intel-xeon-gold-6330-avx512-bf16_bench-dense.json"
    assert str(results.default_path(result)) == name
    (tmp_path / "results").mkdir()
    assert str(results.default_path(result)) == f"results/{name}"


def test_a_file_is_whole_or_not_there(result, tmp_path, monkeypatch):
    path = tmp_path / "new" / "result.json"
    results.write(result, path)
    before = path.read_text()
    assert json.loads(before)["topic"] == "bench-dense"

    def full_disk(self, text, **options):
        type(self).write_bytes(self, text.encode()[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(type(path), "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        results.write(result | {"topic": "other"}, path)
    assert path.read_text() == before
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_the_commit_is_that_of_a_checkout_and_of_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    assert results.commit() is None  # an installed package
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "results.py").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    first = results.commit()
    assert 7 <= len(first) <= 12
    (tmp_path / "results.py").write_text("2")
    assert results.commit() == f"{first}-dirty"
