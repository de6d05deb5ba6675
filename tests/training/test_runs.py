import json
from pathlib import Path

import numpy as np
import pytest

from longspan.inference.run_folder import remember, write_whole
from longspan.training.runs import fingerprint, in_order, newest_checkpoint


def rows(count, seed=0):
    lengths = np.random.default_rng(seed).integers(2, 40, count)
    return [{"input_ids": list(range(number, number + length)), "labels": 0} for number, length in enumerate(lengths)]


def checkpoint(folder: Path, step: int, *, state: str = "{}", random_states=("rng_state.pth",)):
    made = folder / f"checkpoint-{step}"
    made.mkdir()
    (made / "trainer_state.json").write_text(state)
    for name in random_states:
        (made / name).touch()
    return made


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 9)
    whole = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, state='{"global_step": ')
    checkpoint(tmp_path, 12, random_states=())
    (tmp_path / "checkpoint-13").mkdir()
    assert newest_checkpoint(tmp_path) == whole


def test_every_process_must_have_left_its_random_state(tmp_path):
    whole = checkpoint(tmp_path, 5, random_states=("rng_state_0.pth", "rng_state_1.pth"))
    checkpoint(tmp_path, 6, random_states=("rng_state_0.pth",))
    assert newest_checkpoint(tmp_path, 2) == whole
    assert newest_checkpoint(tmp_path, None) == tmp_path / "checkpoint-6"  # of a run that needs none


def test_a_run_remembers_its_arguments_and_refuses_others(tmp_path):
    output = tmp_path / "new" / "run"
    remember(output, {"seed": 0, "sizes": (1, 2)})
    remember(output, {"seed": 0, "sizes": (1, 2)})
    with pytest.raises(ValueError, match=r"other arguments: seed was 0 and is 1; steps was None and is 5. Repeat it"):
        remember(output, {"seed": 1, "sizes": (1, 2), "steps": 5})
    remember(output, {"seed": 1, "sizes": (1, 2)}, may_differ=("seed",))
    assert json.loads((output / "run.json").read_text()) == {"seed": 0, "sizes": [1, 2]}


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "novel.txt").write_text("x")
    with pytest.raises(FileExistsError, match="holds no run to go on with"):
        remember(tmp_path, {})
    with pytest.raises(FileExistsError):
        remember(tmp_path / "novel.txt", {})


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    write_whole(file, "old")

    def full(self, text, **kwargs):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_the_fingerprint_tells_rows_order_and_lists_apart():
    first, second = rows(5), rows(5, seed=1)
    assert fingerprint(first, second) == fingerprint(rows(5), rows(5, seed=1))
    prints = [(first, second), (second, first), (first[::-1], second), (first + second, []), (first, second[:-1])]
    assert len({fingerprint(*lists) for lists in prints}) == len(prints)
    changed = [{**row} for row in first]
    changed[3]["labels"] = 1
    assert fingerprint(changed) != fingerprint(first)


def test_every_row_comes_once_before_any_comes_again():
    features = rows(30)
    for rows_a_step in (10, 15, 8, 40):  # with steps that lie in one pass, and steps that two share
        order = in_order(features, steps=9, batch=1, rows_a_step=rows_a_step, seed=0)
        numbers = [row["input_ids"][0] for row in order]
        assert len(numbers) == 9 * rows_a_step
        for first in range(0, len(numbers) - 30, 30):
            assert sorted(numbers[first : first + 30]) == [*range(30)]
        assert len({*numbers[-30:]}) > 20


def test_rows_of_a_step_are_of_like_length_and_steps_are_not_sorted():
    order = in_order(rows(640), steps=64, batch=10, rows_a_step=10, seed=0)
    lengths = np.array([len(row["input_ids"]) for row in order]).reshape(64, 10)
    assert np.ptp(lengths, axis=1).max() <= 2
    assert not (np.diff(lengths.mean(1)) <= 0).all()


def test_the_order_is_the_seeds():
    features = rows(50)
    first, again, other = (in_order(features, 20, 4, 8, seed) for seed in (3, 3, 4))
    assert first == again != other


def test_a_step_of_broken_batches_is_refused():
    with pytest.raises(ValueError, match="8 rows make none of 3"):
        in_order(rows(9), 2, 3, 8, 0)
