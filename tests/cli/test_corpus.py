import json

import pytest
from pyarrow import parquet
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertModel
from transformers.utils import logging
from typer.testing import CliRunner

from longspan.cli import app
from longspan.inference import corpus_run
from longspan.inference.corpus_worker import TaskWorker

TEXTS = {
    "a.txt": "alice wrote the report. " * 20,
    "b.md": "the red zoo",
    "c.html": "<html><p>bob lives in town</p></html>",
}


@pytest.fixture(autouse=True)
def _transformers_stays_as_loud_as_it_was():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def engine(monkeypatch):
    """The worker in this process, in place of worker processes."""

    def here(task, chunks, **options):
        here.options = options
        worker = TaskWorker(task)
        yield from map(worker.table, chunks)

    monkeypatch.setattr(corpus_run, "on_pool", here)
    return here


@pytest.fixture(scope="module")
def models(save_tiny_bert, tmp_path_factory):
    folders = {}
    for name, kind in (
        ("embed", BertModel),
        ("classify", BertForSequenceClassification),
        ("answer", BertForQuestionAnswering),
    ):
        folders[name] = str(tmp_path_factory.mktemp(name))
        save_tiny_bert(folders[name], kind)
    return folders


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_embed_in_worker_processes_writes_a_vector_a_document(models, folder, tmp_path):
    out = tmp_path / "out"
    done = invoke("embed", models["embed"], folder, out, "--normalize", "--instances", "1")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{out}: 3 rows in ") and done.stdout.endswith(" s, 0 with an error\n")
    table = parquet.read_table(out)
    assert table.column_names == ["id", "error", "tokens", "embedding"]
    assert table["id"].to_pylist() == list(TEXTS)
    for vector in table["embedding"].to_pylist():
        assert len(vector) == 16 and sum(number**2 for number in vector) == pytest.approx(1)
    again = invoke("embed", models["embed"], folder, out, "--normalize")
    assert "0 rows in" in again.stdout and again.stdout.endswith("0 with an error, 3 had theirs before\n")


def test_classify_reads_rows_and_passes_its_options_on(models, tmp_path, engine):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"key": name, "body": text}) + "\n" for name, text in TEXTS.items()))
    arguments = ["classify", models["classify"], rows, tmp_path / "out", "--text-column", "body", "--id-column", "key"]
    options = ["--max-tokens", "20", "--precision", "bf16", "--instances", "3", "--threads-per-instance", "2"]
    done = invoke(*arguments, *options)
    assert done.exit_code == 0, done.output
    table = parquet.read_table(tmp_path / "out")
    assert table.column_names == ["id", "error", "tokens", "label", "score", "scores"]
    assert table["id"].to_pylist() == list(TEXTS) and table["tokens"].to_pylist()[0] == 18
    assert engine.options == {"instances": 3, "threads_per_instance": 2}
    run = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert (run["task"], run["precision"], run["text_column"]) == ("classify", "bf16", "body")
    refused = invoke(*arguments)
    assert refused.exit_code == 2 and "max_tokens was 20 and is None" in refused.stderr


def test_answer_writes_the_passages_of_each_document(models, folder, tmp_path, engine):
    (folder / "d").write_text(" ")
    arguments = ["answer", "who wrote the report?", folder, "--model", models["answer"], "--out", tmp_path / "out"]
    done = invoke(*arguments, "--top", "1")
    assert done.exit_code == 0, done.output
    assert "4 rows in" in done.stdout and "1 with an error" in done.stdout
    assert done.stderr == f"first error: document {folder / 'd'} is empty: it holds no text.\n"
    rows = parquet.read_table(tmp_path / "out").to_pylist()
    assert [len(row["passages"]) for row in rows[:3]] == [1, 1, 1] and rows[3]["passages"] is None
    assert "alice" in rows[0]["passages"][0]["text"]


def test_a_run_in_which_every_document_fails_exits_with_1(models, tmp_path, engine):
    (tmp_path / "rows.jsonl").write_text('{"text": null}\n')
    done = invoke("embed", models["embed"], tmp_path / "rows.jsonl", tmp_path / "out")
    assert done.exit_code == 1 and "first error: document 0 holds no text" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["answer", "who?", "FOLDER", "FOLDER", "--out", "OUT"], "--out takes one corpus"),
        (["answer", "who?", "--out", "OUT"], "--out takes one corpus"),
        (["answer", "who?", "FOLDER", "--out", "OUT", "--json"], "--compare and --json print, and it writes"),
        (["answer", "who?", "FOLDER", "--engine", "ray"], "name a folder for its rows with --out"),
        (["answer", " ", "FOLDER", "--out", "OUT"], "a question and at least one passage are needed"),
        (["embed", "MODEL", "nowhere", "OUT"], "corpus nowhere does not exist"),
        (["embed", "nowhere/model", "FOLDER", "OUT"], "nowhere/model"),
        (["embed", "MODEL", "FOLDER", "OUT", "--address", "127.0.0.1:1"], "choose the engine ray"),
        (["embed", "MODEL", "FOLDER", "OUT", "--engine", "spark"], "'spark' is not one of"),
        (["classify", "MODEL", "FOLDER", "OUT"], "lacks classifier.bias"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(models, folder, tmp_path, engine, arguments, message):
    places = {"FOLDER": folder, "OUT": tmp_path / "out", "MODEL": models["embed"]}
    done = invoke(*(places.get(argument, argument) for argument in arguments))
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not list(tmp_path.glob("out/part-*"))
