import json
from dataclasses import replace

import pytest
from tests.tasks.test_articles import articles, write

from longspan.recipes import characters as recipe
from longspan.recipes.characters import Characters, characters

TINY = {
    "tokens": 1024,
    "tokens_per_step": 128,
    "width": 8,
    "layers": 2,
    "heads": 2,
    "windows": (8, 16),
    "dilations": (1, 2),
    "segments": ((16, 1), (64, 2)),
    "length": 64,
    "full_length": 32,
    "lengths": (16, 64, 128),
    "scored": 8,
    "stretches": 3,
    "megabytes": None,
    "test_share": 0.1,
}


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture
def config(tmp_path):
    return Characters.quick(str(tmp_path / "run"), str(write(tmp_path / "docs.jsonl.xz", articles())), **TINY)


def test_a_recipe_makes_every_row_and_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    told = []
    report = characters(config, tell=told.append)
    rows = {row["name"]: row for row in report["rows"]}
    names = ["Longformer, staged", "LongNet", "full attention", "Longformer, not staged"]
    ablations = ["decreasing", "equal", "increasing", "increasing, two heads dilated"]
    assert list(rows) == names + [f"windows {name}" for name in ablations]
    assert {rows[name]["tokens"] for name in names} == {1024}
    assert {row["tokens"] for row in rows.values() if row["ablation"]} == {512}
    assert [rows[name]["length"] for name in names] == [64, 64, 32, 64]
    staged = rows["Longformer, staged"]
    assert all(0 < bits < 6 for bits in staged["bits"].values()) and list(staged["bits"]) == [16, 64, 128]
    assert staged["gain"] == pytest.approx(staged["bits"][16] - staged["bits"][128])
    assert staged["operations"] < rows["Longformer, not staged"]["operations"]
    assert [length for length, bits in rows["windows equal"]["bits"].items() if bits is not None] == [64]
    assert [row["name"].split(",")[0] for row in report["references"]][:2] == ["gzip -9", "xz -9e"]
    kept = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["dev_bits"] for row in kept["rows"]] == [row["dev_bits"] for row in report["rows"]]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000
    assert "phase 4: 1 steps" in "".join(told) or "phase 4: 2 steps" in "".join(told)

    def never(*_, **__):
        raise AssertionError("a finished step was done again")

    for name in ("bits_of_windows", "compressors"):
        monkeypatch.setattr(recipe, name, never)
    again = characters(config)
    assert [row["bits"] for row in again["rows"]] == [row["bits"] for row in report["rows"]]
    with pytest.raises(ValueError, match=r"other arguments: learning_rate was 0\.002 and is 0\.1"):
        characters(replace(config, learning_rate=0.1))


def test_lengths_that_take_too_long_are_left_out_beyond_those_of_training(config, monkeypatch):
    monkeypatch.setattr(recipe, "MOST_OPERATIONS", 0)
    whole = config.systems()[2]
    monkeypatch.setattr(Characters, "systems", lambda self: (whole,))
    (row,) = characters(config)["rows"]
    assert [length for length, bits in row["bits"].items() if bits is None] == [64, 128]
    assert row["gain"] == 0


def test_minutes_are_turned_into_tokens_by_the_slowest_model_once(config, monkeypatch):
    speeds = iter([300.0, 200.0, 100.0, 250.0])
    monkeypatch.setattr(recipe.Steps, "_speed", lambda self, system: next(speeds))
    steps = recipe.Steps(replace(config, tokens=None, minutes=0.5), print)
    assert steps.budget == 3000
    again = recipe.Steps(replace(config, tokens=None, minutes=0.5), print)
    assert again.budget == 3000  # the machine may have another speed by then


def test_a_few_steps_tell_the_speed(config):
    steps = recipe.Steps(config, print)
    assert all(steps._speed(system) > 0 for system in config.systems()[:2])


def test_all_systems_have_as_many_parameters_and_one_schedule(config):
    steps = recipe.Steps(config, print)
    systems = config.systems()
    sizes = {system.name: steps.model(system).num_parameters() for system in systems}
    assert len({size for name, size in sizes.items() if name != "LongNet"}) == 1
    assert max(sizes.values()) / min(sizes.values()) < 1.15  # LongNet's layers have two norms more
    schedules = [steps.curriculum(system) for system in systems if not system.ablation]
    assert len({tuple(phase.steps for phase in schedule.phases) for schedule in schedules}) == 1
    assert len({schedule.rate(5) for schedule in schedules}) == 1
    staged, _, _, whole = schedules
    assert [phase.length for phase in staged.phases] == [8, 16, 32, 64]
    assert [phase.windows for phase in staged.phases] == [(1, 2), (2, 4), (4, 8), (8, 16)]
    assert {phase.length for phase in whole.phases} == {64}


def test_missing_articles_are_asked_for(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="give the articles to learn from"):
        characters(replace(config, articles=str(tmp_path / "none.jsonl.xz")))


def test_a_test_split_shorter_than_a_window_is_refused(config):
    with pytest.raises(ValueError, match=r"the longest length to evaluate is 1,000,000: give more articles"):
        characters(replace(config, lengths=(16, 1_000_000), ablation_share=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": (1, 2, 3)}, "windows must be one number for each of 2 layers"),
        ({"minutes": 0.0}, "minutes must be greater than 0"),
        ({"tokens": 100}, "tokens must be at least 512, a step for each stage; got 100"),
        ({"length": 60}, "length must be a multiple of 8"),
        ({"scored": 16}, "scored must be smaller than every length"),
        ({"ablation_share": 2.0}, "ablation_share must lie between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, config):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)
