import copy
import json

import pytest
from tests.models.tiny import tiny_model
from transformers.utils import logging
from typer.testing import CliRunner

from longspan.cli import app

pytest.importorskip("onnxruntime", reason="needs pip install longspan[onnx]")


@pytest.fixture(autouse=True)
def _transformers_stays_as_loud_as_it_was():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("checkpoint")
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    size = {"vocab_size": len(tokenizer), "n_layers": 1}
    tiny_model("distilbert", "sequence_classification", **size, **names).save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)  # other tests share it
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_export_says_what_it_wrote_and_evaluate_runs_it(checkpoint, tmp_path):
    out = tmp_path / "model.onnx"
    done = invoke("export", checkpoint, out, "--precision", "int8")
    assert done.exit_code == 0, done.output
    assert f"{out}: LongspanForSequenceClassification in int8, " in done.stdout
    assert "input_ids, attention_mask -> logits; differs from the module by at most" in done.stdout
    again = invoke("export", checkpoint, out)
    assert again.exit_code == 2 and "exists" in again.stderr

    rows = tmp_path / "rows.tsv"
    rows.write_text("sentence\tlabel\nalice lives in town\tgood\nbob\tbad\nzebra\tgood\n")
    engines = ["--engine", "huggingface", "--engine", "longspan:int8", "--engine", "onnx:int8", "--onnx", out]
    evaluated = invoke("evaluate", "task", checkpoint, "--file", rows, "--text-column", "sentence", *engines, "--json")
    assert evaluated.exit_code == 0, evaluated.output
    table = json.loads(evaluated.stdout)
    assert [(row["engine"], row["precision"]) for row in table["rows"]] == [
        ("huggingface", "fp32"),
        ("longspan", "int8"),
        ("onnx", "int8"),
    ]
    assert table["rows"][0]["documents"] == 3 and table["rows"][0]["metrics"]["accuracy"] in (1 / 3, 2 / 3)

    shown = invoke("evaluate", "task", checkpoint, "--file", rows, "--text-column", "sentence", "--batch", 2)
    assert shown.exit_code == 0 and "rows dev: 3 documents" in shown.stdout and "longspan fp32" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either a --task or a --file"),
        (["--task", "boolq", "--file", "rows.csv"], "name either a --task or a --file"),
        (["--file", "missing.csv"], "there is no file missing.csv"),
        (["--task", "nonsense"], "there is no task 'nonsense'"),
    ],
)
def test_evaluate_task_refuses_what_it_cannot_find(checkpoint, arguments, message):
    done = invoke("evaluate", "task", checkpoint, *arguments)
    assert done.exit_code == 2 and message in done.stderr
