import json
from dataclasses import replace

import pytest
from tests.tasks.test_articles import articles, write
from tests.training.language_run import small_model
from transformers.utils import logging
from typer.testing import CliRunner

from longspan.cli import app
from longspan.recipes import characters as characters_recipe
from longspan.recipes import language_models
from longspan.recipes.language_models import LanguageRecipe, tiny_stages

RUNNER = CliRunner()


def call(*arguments):
    return RUNNER.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _transformers_stays_as_loud_as_it_was():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture
def book(tmp_path, monkeypatch):
    stages = tiny_stages(
        tokens=600, tokens_per_step=64, length=32, learning_rate=1e-2, windows=(4, 8), shares=(0.7, 0.3)
    )
    recipe = LanguageRecipe(model=small_model, curriculum=stages, settings={"accumulate": 2})
    monkeypatch.setitem(language_models.RECIPES, "small", lambda: replace(recipe, about="for tests"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("the old zoo is near the river " * 60)
    return tmp_path / "book.txt"


def test_a_language_model_is_trained_evaluated_and_writes(book, tmp_path):
    done = call("train", "lm", "--recipe", "small", "--data", book, "--log-steps", 2, "--save-steps", 4)
    assert done.exit_code == 0, done.output
    assert "phase 1: 6 steps of 4 x 16 tokens, windows 2 to 4" in done.stderr.replace("7 steps", "6 steps")
    assert "bits per character on dev" in done.stdout and "small-book" in done.stdout
    model = tmp_path / "small-book" / "model"
    assert (tmp_path / "small-book-tokens" / "tokens.json").is_file()

    scored = call("evaluate", "lm", model, "--data", book, "--length", 40, "--stride", 8, "--references")
    assert scored.exit_code == 0, scored.output
    assert "bits per character: 8 of 8 windows of 40 tokens, stride 8" in scored.stdout
    assert "the first window scores all its tokens but the very first" in scored.stdout
    assert "gzip -9: " in scored.stdout and "PPMd" in scored.stdout
    figures = json.loads(
        call("evaluate", "lm", model, "--data", book, "--length", 40, "--stride", 8, "--split", "all", "--json").stdout
    )
    assert figures["tokens"] == 1799 and 0 < figures["bits"] < 5

    written = call("generate", model, "--prompt", "the old ", "--max-new-tokens", 12)
    assert written.exit_code == 0 and written.stdout.startswith("the old ") and len(written.stdout) == 21
    assert "12 tokens in" in written.stderr
    refused = call("generate", model, "--prompt", "THE")
    assert refused.exit_code == 2 and not refused.stdout
    assert "3 of 3 characters are outside the model's alphabet" in refused.stderr


def test_a_dry_run_prints_the_schedule_and_writes_nothing(book, tmp_path):
    done = call("train", "lm", "--recipe", "longformer-small", "--data", book, "--dry-run", "--steps", 100)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("phase") == 5 and "in all: 100 steps" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "lm", "--recipe", "huge", "--data", "book.txt"), "no recipe 'huge'; there is longformer-tiny"),
        (("train", "lm", "--recipe", "small", "--data", "none.txt"), "no file or folder none.txt"),
        (("train", "lm", "--recipe", "longnet-tiny", "--data", "book.txt"), "phase 1 reads rows of 8,192"),
        (("recipe", "characters", "out", "--articles", "none.jsonl.xz"), "give the articles to learn from"),
    ],
)
def test_mistakes_are_one_line(arguments, message, book):
    done = call(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_recipe_prints_its_tables(tmp_path, monkeypatch):
    row = {
        "name": "LongNet",
        "ablation": False,
        "length": 64,
        "bits": {16: 2.5, 64: None},
        "gain": 0.01,
        "gain_error": 0.002,
        "tokens": 1_500_000,
        "tokens_per_second": 1234.0,
        "minutes": 20.25,
        "peak_memory_gib": 1.5,
    }
    report = {
        "rows": [row, row | {"ablation": True, "name": "windows equal"}],
        "references": [
            {"name": "gzip -9", "bits": 2.7, "note": ""},
            {"name": "PPMd", "bits": None, "note": "pip install longspan[evaluate]"},
        ],
    }
    seen = []

    def run(config, tell):
        seen.append(config)
        return report

    monkeypatch.setattr(characters_recipe, "characters", run)
    done = call(
        "recipe", "characters", tmp_path / "out", "--articles", write(tmp_path / "a.jsonl", articles()), "--quick"
    )
    assert done.exit_code == 0, done.output
    assert seen[0].tokens == 16_384
    for part in (
        "LongNet",
        "2.5000",
        "0.0100 ± 0.0020",
        "1.5",
        "1,234",
        "windows equal",
        "gzip -9: 2.7000",
        "PPMd: pip",
    ):
        assert part in done.stdout
