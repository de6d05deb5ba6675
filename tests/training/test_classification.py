import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.training.classification_run import SETTINGS, run, task
from transformers import BertModel

from longspan.models.classifiers import load_classifier
from longspan.models.heads import LongspanForSequenceClassification
from longspan.tasks.task import tokenize
from longspan.training.classification import ClassifierTraining, predict_logits, train_classifier

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def base(save_tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_bert(folder, BertModel, initializer_range=0.2)
    return folder


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished"), base)[0]


def history(output, step=12):
    entries = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    kept = ("step", "loss", "eval_loss", "eval_accuracy", "grad_norm", "learning_rate")
    return [{name: entry[name] for name in kept if name in entry} for entry in entries if "train_runtime" not in entry]


def same_weights(first, second):
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def in_another_process(*arguments, processes=1):
    start = [sys.executable, "-W", "ignore", "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    threads = 1 if processes > 1 else torch.get_num_threads()  # sums of gradients depend on it
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [*start, "tests.training.classification_run", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_best_checkpoint_is_what_is_left(base, tmp_path):
    """Later weights that are worse on dev lose: dev is scored by a script here."""
    scores, seen = iter([0.2, 0.9, 0.5]), []
    colors = task()
    loaded = load_classifier(base, colors.labels)
    train, dev = (tokenize(colors.examples(split), loaded.tokenizer) for split in ("train", "dev"))

    def measure(logits):
        seen.append(logits)
        return {"score": next(scores)}

    config = ClassifierTraining(output=str(tmp_path), metric="score", **SETTINGS)
    done = train_classifier(loaded.model, loaded.tokenizer, train, dev, measure, config)
    assert (done.best_step, done.steps, done.metrics["score"]) == (10, 12, 0.9)
    assert same_weights(done.model, tmp_path / "checkpoint-10")
    assert not same_weights(done.model, tmp_path / "checkpoint-12")
    found = predict_logits(loaded.model, dev, loaded.tokenizer, bf16=True)
    np.testing.assert_allclose(found, seen[1], atol=1e-2)
    again = LongspanForSequenceClassification.from_pretrained(done.model).eval()
    assert torch.equal(again.classifier.weight, loaded.model.classifier.weight)


def test_dev_is_measured_in_its_own_order(finished, base):
    """The Trainer reads long rows first; the figures are those of the rows as they stand."""
    colors = task()
    model = LongspanForSequenceClassification.from_pretrained(finished.model)
    loaded = load_classifier(base, colors.labels)
    dev = tokenize(colors.examples("dev"), loaded.tokenizer)
    logits = predict_logits(model, dev, loaded.tokenizer, batch=5, bf16=True)
    figures = colors.metrics("dev", logits)
    assert figures == {name: finished.metrics[name] for name in figures}
    assert any(figures != colors.metrics("dev", np.roll(logits, by, axis=0)) for by in range(1, len(logits)))
    together = predict_logits(model, dev, loaded.tokenizer, batch=5)
    one_by_one = np.concatenate([predict_logits(model, [row], loaded.tokenizer) for row in dev])
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
    assert len({len(row["input_ids"]) for row in dev}) > 3


def test_a_run_killed_by_signal_9_ends_as_if_it_had_not_been(base, finished, tmp_path):
    killed = in_another_process(tmp_path, base, 9)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "model").exists()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    again, _ = run(tmp_path, base)
    assert replace(again, model=finished.model) == finished
    assert same_weights(again.model, finished.model)
    assert history(tmp_path) == history(finished.model.parent)


def test_a_run_killed_while_it_wrote_a_checkpoint_goes_on_from_the_one_before(base, finished, tmp_path):
    output = finished.model.parent
    best = output / f"checkpoint-{finished.best_step}"
    assert finished.best_step < 12
    shutil.copytree(best, tmp_path / best.name)
    shutil.copytree(best, tmp_path / "checkpoint-12")
    shutil.copy(output / "run.json", tmp_path)
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-12" / "model.safetensors").write_bytes(b"torso")
    again, _ = run(tmp_path, base)
    assert replace(again, model=finished.model) == finished
    assert same_weights(again.model, finished.model)


def test_a_finished_run_is_not_repeated_and_another_is_refused(base, finished):
    before = (finished.model / "model.safetensors").stat().st_mtime_ns
    again, model = run(finished.model.parent, base)
    assert again == finished
    assert (finished.model / "model.safetensors").stat().st_mtime_ns == before
    best = load_file(finished.model / "model.safetensors")
    assert torch.equal(model.classifier.weight, best["classifier.weight"])
    with pytest.raises(ValueError, match=r"other arguments: learning_rate was 0\.02 and is 0\.001"):
        run(finished.model.parent, base, learning_rate=1e-3)


def test_a_disk_that_is_full_at_the_end_leaves_a_run_that_can_be_finished(base, finished, tmp_path, monkeypatch):
    shutil.copytree(finished.model.parent, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    whole = LongspanForSequenceClassification.save_pretrained

    def full(self, folder, **kwargs):
        whole(self, folder, **kwargs)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(LongspanForSequenceClassification, "save_pretrained", full)
        run(tmp_path / "run", base)
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob(".*"))
    again, _ = run(tmp_path / "run", base)
    assert same_weights(again.model, finished.model)


def test_two_processes_share_each_step(base, tmp_path):
    done = in_another_process(tmp_path, base, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(set(line for line in done.stdout.splitlines() if line.startswith("Trained("))) == 1
    assert json.loads((tmp_path / "run.json").read_text())["processes"] == 2
    assert json.loads((tmp_path / "model" / "training.json").read_text())["run"]["processes"] == 2
    assert (tmp_path / "checkpoint-12" / "rng_state_1.pth").is_file()


def test_curves_are_written_for_tensorboard(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished.model.parent / "tensorboard")).Reload()
    assert {"train/loss", "eval/accuracy", "train/learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("eval/accuracy")] == [5, 10, 12]


def test_steps_follow_from_passes(base, tmp_path):
    done, _ = run(tmp_path, base, steps=None, epochs=0.5, accumulate=2, evaluate_steps=None)
    assert done.steps == math.ceil(0.5 * 40 / 8)
    assert [entry["step"] for entry in history(tmp_path, 3) if "eval_loss" in entry] == [3]


def test_rows_that_cannot_train_are_refused(base, tmp_path):
    colors = task()
    loaded = load_classifier(base, colors.labels)
    rows = tokenize(colors.examples("dev"), loaded.tokenizer)
    train = partial(train_classifier, loaded.model, loaded.tokenizer)
    config = ClassifierTraining(output=str(tmp_path / "run"), **SETTINGS)
    with pytest.raises(ValueError, match="there are no dev rows"):
        train(rows, [], lambda logits: {}, config)
    secret = [{name: row[name] for name in row if name != "labels"} for row in rows[:2]]
    with pytest.raises(ValueError, match="2 of 15 train rows have no label"):
        train([*rows, *secret], rows, lambda logits: {}, config)
    with pytest.raises(ValueError, match="metric 'accuracy' is not measured; there is f1"):
        train(rows, rows, lambda logits: {"f1": 0.5}, replace(config, steps=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"epochs": 0}, "epochs must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be greater than 0; got nan"),
        ({"warmup_fraction": 1.0}, "warmup_fraction must be at least 0 and below 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ClassifierTraining(output="run", **changes)
