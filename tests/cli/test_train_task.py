import json
import re

import pytest
from transformers import BertModel
from transformers.utils import logging
from typer.testing import CliRunner

from longspan.cli import app

QUICK = ("--steps", 2, "--batch", 4, "--no-bf16")


@pytest.fixture(autouse=True)
def _transformers_stays_as_loud_as_it_was():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def base(save_tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_bert(folder, BertModel)
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    pairs = [{"a": f"the zoo {n}", "b": "old town", "y": ("no", "yes")[n % 2]} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, ["train", "task", *(str(argument) for argument in arguments)])


def test_a_file_of_pairs_trains_a_model(base, rows, tmp_path):
    columns = ("--text-column", "a", "--text-pair-column", "b", "--label-column", "y")
    done = invoke(base, tmp_path / "run", "--train", rows, "--test", rows, *columns, *QUICK)
    assert done.exit_code == 0, done.output
    *_, wrote, dev, test = done.stdout.splitlines()
    assert re.fullmatch(r"wrote .*run.model, the best of 2 steps \(step 2\)", wrote)
    assert re.fullmatch(r"dev: accuracy [\d.]+, loss [\d.]+, macro_f1 [\d.]+", dev)
    assert re.fullmatch(r"test: accuracy [\d.]+, macro_f1 [\d.]+", test)
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["label2id"] == {"no": 0, "yes": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name either a --task or a file with labeled rows, --train"),
        (("--task", "rte", "--train", "a.csv"), "name either a --task or"),
        (("--task", "imdb", "--dev", "a.csv"), "--dev and --test go with --train"),
        (("--task", "rte"), "rte needs the folder where SuperGLUE was unpacked"),
        (("--train", "absent.csv"), "there is no file absent.csv"),
        (("--train", "ROWS"), "has no column 'text' (line 1); it has 'a', 'b', 'y'"),
        (("--train", "ROWS", "--text-column", "a", "--label-column", "y", "--epochs", 0), "epochs must be greater"),
        (("--train", "ROWS", "--text-column", "a", "--label-column", "y", "--max-tokens", 2), "at least 3"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, base, rows, tmp_path):
    done = invoke(base, tmp_path / "run", *(rows if argument == "ROWS" else argument for argument in arguments))
    assert done.exit_code == 2
    assert done.stderr.startswith("longspan: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
