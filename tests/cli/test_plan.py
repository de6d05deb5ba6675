import json

import pytest
from transformers.utils import logging
from typer.testing import CliRunner

from longspan import LongNetConfig
from longspan.cli import app
from longspan.cli.plan import amount, whole

RUNNER = CliRunner()


def call(*arguments):
    return RUNNER.invoke(app, ["plan", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _transformers_stays_as_loud_as_it_was():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture
def model(tmp_path):
    LongNetConfig(num_hidden_layers=3, positions="rotary").save_pretrained(tmp_path / "longnet")
    return tmp_path / "longnet"


def test_a_plan_for_a_billion_tokens_is_printed(model):
    done = call(
        *(model, "--tokens", "1e9", "--devices", 64, "--device-memory", "80GiB"),
        *("--flops-per-second", "4e14", "--bytes-per-second", "50GB"),
    )
    assert done.exit_code == 0, done.output
    for part in (
        "training in bf16 on 1,000,000,000 tokens, 15,625,000 on each of 64 devices",
        "1-3 segments",
        "does not fit in 80 GiB",
        "devices are enough, one less is not",
        "computing:",
        "sending:",
    ):
        assert part in " ".join(done.stdout.split())


def test_json_holds_the_same_plan(model):
    done = call(model, "--tokens", 2**20, "--devices", 8, "--mode", "inference", "--precision", "fp32", "--json")
    found = json.loads(done.stdout)
    assert (found["tokens"], found["devices"], found["mode"], found["precision"]) == (2**20, 8, "inference", "fp32")
    assert len(found["layers"]) == 3 and found["memory"]["optimizer"] == 0 and found["fits"] is None


def test_recipes_are_planned_by_name():
    small, large = (
        json.loads(call("longformer-tiny", "--tokens", 8192, "--vocab-size", size, "--json").stdout)
        for size in (256, 512)
    )
    assert large["parameters"] - small["parameters"] == 256 * 256
    assert small["model"] == "longformer-tiny"


@pytest.mark.parametrize(
    ("text", "value"),
    [("64", 64), ("1e9", 1e9), ("80GiB", 80 * 2**30), ("50 gb", 5e10), ("1,000_000", 1e6), ("1.5TB", 1.5e12)],
)
def test_amounts_are_read_with_their_units(text, value):
    assert amount(text, "--device-memory") == value


@pytest.mark.parametrize("text", ["", "many", "-1", "80 apples", "1e999", "0", "GiB", "1e-9"])
def test_amounts_that_are_none_are_refused_by_name(text):
    with pytest.raises(ValueError, match=r"--device-memory must be .*; got "):
        amount(text, "--device-memory")


@pytest.mark.parametrize("text", ["1.5", "80GiB"])
def test_numbers_that_are_not_whole_are_refused_by_name(text):
    with pytest.raises(ValueError, match="--tokens must be "):
        whole(text, "--tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none", "--tokens", "64"), "there is no plan for 'none': it is no recipe (longformer-tiny, "),
        (("longnet-tiny", "--tokens", "1e9x"), "--tokens must be a number such as 1e9 or 64; got '1e9x'"),
        (("longnet-tiny", "--tokens", "64", "--devices", "65"), "got 65 devices for 64 tokens"),
        (("longnet-tiny", "--tokens", "64", "--global-tokens", "2"), "2 global tokens"),
        (("longnet-tiny", "--tokens", "64", "--device-memory", "much"), "such as 80GiB, 50GB or 1e9; got 'much'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
