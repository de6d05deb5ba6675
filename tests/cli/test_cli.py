import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import BertForQuestionAnswering
from transformers.utils import logging
from typer.testing import CliRunner

import longspan
from longspan.cli import app, main
from longspan.cli.answer import _describe
from longspan.inference.compare import Comparison

TEXT = "alice wrote the report\nnear the old river.\n\n" + "the old zoo is near the river. " * 40


@pytest.fixture(autouse=True)
def _transformers_stays_as_loud_as_it_was():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def checkpoint(save_tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    save_tiny_bert(folder, BertForQuestionAnswering, initializer_range=0.5)
    return str(folder)


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "report.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def invoke(*arguments, **kwargs):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **kwargs)


def test_help_names_every_command_without_loading_torch():
    code = "import sys\nfrom longspan.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("answer", "convert", "evaluate", "train"):
        assert command in done.stdout
    assert not {"torch", "transformers", "numpy"} & set(done.stdout.split())


def test_version():
    assert invoke("--version").stdout.strip() == longspan.__version__


def test_passages_are_printed_with_place_probability_and_speed(checkpoint, document):
    done = invoke("answer", "who wrote the report?", document, "--model", checkpoint, "--top", "2")
    assert done.exit_code == 0, done.output
    assert "1. " in done.stdout and "report.txt, line " in done.stdout.replace("\n", "")
    assert "%)" in done.stdout
    assert "[[" in done.stdout and "]]" in done.stdout
    assert "tokens/s)" in done.stdout
    assert done.stderr == ""


def test_json_is_the_documented_schema_and_nothing_else(checkpoint, document):
    done = invoke("answer", "who wrote the report?", document, "--model", checkpoint, "--json")
    data = json.loads(done.stdout)
    assert list(data) == ["question", "answer", "answer_probability", "passages", "tokens", "seconds", "model"]
    passage = data["passages"][0]
    assert passage["document"] == document
    assert passage["text"] == TEXT[passage["start_char"] : passage["end_char"]]
    assert data["answer"] in passage["text"]


def test_a_precision_is_passed_on(checkpoint, document):
    for precision in ("bf16", "int8"):
        done = invoke("answer", "who?", document, "--model", checkpoint, "--precision", precision)
        assert done.exit_code == 0, done.output
    done = invoke("answer", "who?", document, "--model", checkpoint, "--precision", "fp8")
    assert done.exit_code == 2 and "fp8" in done.stderr


def test_compare_prints_both_times_and_the_largest_difference_before_the_answer(checkpoint, document):
    arguments = ("answer", "who wrote the report?", document, "--model", checkpoint, "--compare")
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    line, _, answer = done.stdout.partition("\n")
    assert re.fullmatch(
        r"longspan N s, Hugging Face N s \(Nx\), largest difference N in span logits / N in scores",
        re.sub(r"\d[\d.e-]*", "N", line),
    )
    assert "1. " in answer
    data = json.loads(invoke(*arguments, "--json").stdout)
    assert list(data)[-1] == "compare"
    assert data["compare"]["model"] == "BertForQuestionAnswering"
    assert data["compare"]["tokens"] == data["tokens"]


def test_compare_says_where_it_stopped():
    comparison = Comparison(
        model="LongformerModel",
        tokens=16384,
        longspan_seconds=1.2345,
        hugging_face_seconds=9.876,
        output="token vectors",
        output_difference=0.0031,
        score_difference=0.00206,
    )
    assert _describe(comparison, 128071) == (
        "first 16,384 of 128,071 tokens: longspan 1.23 s, Hugging Face 9.88 s (8.0x), "
        "largest difference 0.003 in token vectors / 0.002 in scores\n"
    )


def test_several_files_and_standard_input_are_read_together(checkpoint, document):
    done = invoke(
        "answer",
        "who?",
        document,
        "-",
        "--model",
        checkpoint,
        "--json",
        "--top",
        "99",
        input="the red zebra lives here",
    )
    assert {passage["document"] for passage in json.loads(done.stdout)["passages"]} == {document, "standard input"}


def test_threads_are_passed_on(checkpoint, document):
    before = torch.get_num_threads()
    try:
        assert invoke("answer", "who?", document, "--model", checkpoint, "--threads", "1").exit_code == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_document_cannot_command_the_terminal(checkpoint, tmp_path):
    path = tmp_path / "evil.txt"
    path.write_text("alice \x1b[2J\x9b wrote [bold]the[/bold] report", encoding="utf-8")
    done = invoke("answer", "who?", path, "--model", checkpoint)
    assert "\x1b" not in done.stdout and "\x9b" not in done.stdout
    assert "[bold]the[/bold]" in done.stdout


BAD_INPUT = {
    "missing file": (["who?", "nowhere.txt"], "document nowhere.txt does not exist"),
    "directory": (["who?", "{folder}"], "is a directory"),
    "empty document": (["who?", "{empty}"], "is empty: it holds no text"),
    "binary file": (["who?", "{binary}"], "is a binary file (a zero byte at offset 2)"),
    "wrong encoding": (["who?", "{latin}"], "is not utf-8 text (byte 0xfc at offset 2)"),
    "unknown encoding": (["who?", "{document}", "--encoding", "utf-9"], "unknown text encoding 'utf-9'"),
    "empty question": ([" ", "{document}", "--model", "{checkpoint}"], "the question is empty"),
    "long question": (["who " * 33, "{document}", "--model", "{checkpoint}"], "more than half of the 64 tokens"),
    "no model": (["who?", "{document}", "--model", "{folder}"], "has no config.json"),
    "no weights": (["who?", "{document}", "--model", "{no_weights}"], "has no weights"),
    "pickle only": (["who?", "{document}", "--model", "{pickle}"], "holds its weights only as a pickle"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(checkpoint, document, tmp_path, arguments, message):
    places = {"checkpoint": checkpoint, "document": document, "folder": str(tmp_path / "folder")}
    (tmp_path / "folder").mkdir()
    for name, data in {"empty": b"", "binary": b"\x01\x02\x00", "latin": b"gr\xfcn"}.items():
        places[name] = str(tmp_path / name)
        (tmp_path / name).write_bytes(data)
    for name, files in {"no_weights": ["config.json"], "pickle": ["config.json", "pytorch_model.bin"]}.items():
        places[name] = str(tmp_path / name)
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
    done = invoke("answer", *(argument.format(**places) for argument in arguments))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("longspan: ") and done.stderr.count("\n") == 1


def test_bad_input_shows_no_traceback_in_a_real_process():
    done = subprocess.run(
        [sys.executable, "-m", "longspan", "answer", "who?", "nowhere.txt"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("longspan: document nowhere.txt does not exist") and done.stderr.count("\n") == 1


def test_bugs_keep_their_traceback(monkeypatch, document):
    import longspan.cli.answer

    def broken(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr(longspan.cli.answer, "_read", broken)
    assert isinstance(invoke("answer", "who?", document).exception, TypeError)


def test_an_interrupt_ends_with_130(monkeypatch, document):
    import longspan.cli.answer

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(longspan.cli.answer, "_read", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["answer", "who?", document])
    assert caught.value.code == 130


def test_convert_writes_a_long_model_that_answers(checkpoint, document, tmp_path):
    done = invoke("convert", checkpoint, tmp_path / "long", "--max-tokens", "none", "--window", "16")
    assert done.exit_code == 0, done.output
    assert "reads any number of tokens through windows of 16" in done.stdout
    assert done.stderr == ""
    done = invoke("answer", "who wrote the report?", document, "--model", tmp_path / "long", "--json")
    assert json.loads(done.stdout)["answer"] in TEXT


def test_convert_refuses_a_directory_that_holds_something(checkpoint, tmp_path):
    (tmp_path / "a").touch()
    done = invoke("convert", checkpoint, tmp_path)
    assert done.exit_code == 2 and "exists" in done.stderr and done.stderr.count("\n") == 1


def test_convert_refuses_a_length_that_is_no_number(tmp_path):
    done = invoke("convert", "model", tmp_path / "out", "--max-tokens", "4k")
    assert done.exit_code == 2 and "--max-tokens is a number of tokens or none; got '4k'" in done.stderr


def test_evaluate_prints_a_table_or_its_json(monkeypatch):
    import longspan.tasks.evidence

    row = {"system": "reader", "top1": 0.6, "top3": 0.84, "late_top1": None, "tokens_per_second": 8000}
    left_out = dict.fromkeys(row) | {"system": "bm25 (left out: pip install longspan[evaluate])"}
    table = {"condition": "as_is", "questions": 7, "rows": [row, left_out]}
    asked = []
    monkeypatch.setattr(
        longspan.tasks.evidence, "evaluate_reader", lambda data, **options: asked.append(options) or table
    )
    arguments = ("evaluate", "reader", "--data", "d", "--condition", "as_is", "--limit", "7", "--precision", "int8")
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    assert "7 questions" in done.stdout and "0.840" in done.stdout and "8,000" in done.stdout
    assert "longspan[evaluate]" in done.stdout  # not taken for markup
    assert json.loads(invoke(*arguments, "--json").stdout) == table
    assert asked[0] == asked[1]
    assert (asked[0]["condition"], asked[0]["split"], asked[0]["limit"]) == ("as_is", "dev", 7)
    assert asked[0]["precision"] == "int8"


def test_train_hands_its_options_to_the_training(monkeypatch, tmp_path):
    import longspan.training.reader

    configs = []
    monkeypatch.setattr(longspan.training.reader, "train_reader", lambda config: configs.append(config) or tmp_path)
    done = invoke("train", "reader", "--base", "b", "--data", "d", "--output", "o", "--steps", "7", "--no-bf16")
    assert done.exit_code == 0, done.output
    assert (configs[0].base, configs[0].data, configs[0].output) == ("b", "d", "o")
    assert (configs[0].steps, configs[0].bf16) == (7, False)
    assert done.stdout == f"wrote {tmp_path}\n"
