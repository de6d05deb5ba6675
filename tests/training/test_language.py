import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.training.language_run import CURRICULUM, SETTINGS, make_tokens, run
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from longspan.models.text_tokenizers import encode
from longspan.training.curriculum import Curriculum, Phase
from longspan.training.language import LanguageTraining, train_language_model
from longspan.training.language_trainer import LanguageTrainer

ROOT = Path(__file__).parents[2]
MACHINE = ("tokens_per_second", "memory_gib", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(tokens, tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished") / "run", tokens)


def curve(done):
    """Everything that was logged, but for the machine's part."""
    return [
        {name: value for name, value in entry.items() if name not in MACHINE}
        for entry in done.history
        if "train_runtime" not in entry
    ]


def same_weights(first, second):
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("step", [4, 9])
def test_a_run_killed_by_signal_9_goes_on_with_the_same_loss_curve(step, tokens, finished, tmp_path):
    """In the first phase, and in the second, whose windows, rows and optimizer state are to be found again."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.language_run"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [*command, str(tmp_path / "run"), str(tokens.folder), str(step)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "model").exists()
    done, model, told = run(tmp_path / "run", tokens)
    assert f"going on from checkpoint-{3 * (step // 3)}" in told
    assert curve(done) == curve(finished[0])
    assert same_weights(done.model, finished[0].model)
    assert model.config.windows == (4, 8)


def test_phases_have_their_windows_rows_and_learning_rates(tokens, tmp_path, monkeypatch):
    seen = []
    whole = LanguageTrainer.training_step

    def training_step(self, model, inputs, *rest):
        seen.append((model.config.windows, tuple(inputs["input_ids"].shape), self.optimizer.param_groups[0]["lr"]))
        return whole(self, model, inputs, *rest)

    monkeypatch.setattr(LanguageTrainer, "training_step", training_step)
    done, model, _ = run(tmp_path / "run", tokens)
    steps = seen[::2]  # of two accumulated batches
    assert [(windows, shape) for windows, shape, _ in steps] == [((2, 4), (2, 16))] * 8 + [((4, 8), (1, 32))] * 4
    assert [rate for *_, rate in steps] == pytest.approx([CURRICULUM.rate(step) for step in range(12)])
    assert (done.steps, done.tokens) == (12, 12 * 64)
    loaded = AutoModelForCausalLM.from_pretrained(done.model)
    assert loaded.config.windows == (4, 8) and type(loaded) is type(model)


def test_the_optimizers_state_goes_on_from_phase_to_phase(finished):
    state = torch.load(finished[0].model.parent / "checkpoint-12" / "optimizer.pt")
    assert {float(part["step"]) for part in state["state"].values()} == {12.0}


def test_logged_bits_are_those_of_the_rows(finished, tokens):
    done, model, _ = finished
    first = next(entry for entry in done.history if "loss" in entry)
    assert first["bits"] == pytest.approx(first["loss"] / math.log(2))
    assert abs(first["loss"] - math.log(len(tokens.tokenizer))) < 0.3  # the mean over tokens, whatever is accumulated
    assert [entry["tokens_seen"] for entry in done.history if "eval_bits" in entry] == [320, 640, 768]
    ids = torch.from_numpy(np.array(tokens.splits["dev"][:128], np.int64)).reshape(4, 32)
    with torch.inference_mode():
        expected = model.eval()(input_ids=ids, labels=ids).loss.item() / math.log(2)
    assert done.bits == pytest.approx(expected, rel=2e-2)  # bf16, where the processor has it


def test_bits_are_counted_per_character_where_tokens_are_longer(tmp_path):
    tokens = make_tokens(tmp_path, "bpe")
    done, _, _ = run(tmp_path / "run", tokens)
    entry = next(entry for entry in done.history if "eval_bits" in entry)
    ratio = len(tokens.splits["dev"]) / tokens.units["dev"]
    assert ratio < 0.6
    assert entry["eval_bits"] == pytest.approx(entry["eval_loss"] / math.log(2) * ratio)


def test_the_model_is_there_with_its_tokenizer_curves_and_progress(finished, tokens):
    done, _, told = finished
    text = "the old zoo"
    assert encode(AutoTokenizer.from_pretrained(done.model), text).tolist() == encode(tokens.tokenizer, text).tolist()
    assert (done.model.parent / "curves.png").read_bytes()[1:4] == b"PNG"
    assert told[0].startswith("phase 1: 8 steps of 4 x 16 tokens, windows 2 to 4")
    line = next(line for line in told if line.startswith("step 12 of 12"))
    for part in ("phase 2", "loss", "bits per character", "tokens/s", "GiB", "learning rate", "min left"):
        assert part in line
    assert any(line.startswith("step 5: dev ") for line in told)
    assert done.tokens_per_second > 0 and 0.05 < done.peak_memory_gib < 50


def test_curves_are_written_for_tensorboard(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0].model.parent / "tensorboard")).Reload()
    assert {"train/loss", "train/bits", "eval/bits", "train/tokens_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("eval/bits")] == [5, 10, 12]


def test_a_finished_run_is_not_repeated_and_another_is_refused(finished, tokens, tmp_path):
    done, _, _ = finished
    before = (done.model / "model.safetensors").stat().st_mtime_ns
    again, model, told = run(done.model.parent, tokens)
    assert again == done and not told and model.config.windows == (4, 8)
    assert (done.model / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"other arguments: max_grad_norm was 1\.0 and is 0\.5"):
        run(done.model.parent, tokens, max_grad_norm=0.5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="holds no run to go on with"):
        run(tmp_path / "other", tokens)


def test_a_run_killed_after_its_last_step_is_finished(finished, tokens, tmp_path):
    shutil.copytree(finished[0].model.parent, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    done, _, _ = run(tmp_path / "run", tokens)
    assert same_weights(done.model, finished[0].model)
    assert done.bits == finished[0].bits
    assert curve(done) == curve(finished[0])


def test_other_models_train_too_without_windows(tokens, tmp_path):
    size = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 32, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokens.tokenizer), loss_type="ForCausalLM", **size))
    plain = Curriculum(phases=tuple(replace(phase, windows=None) for phase in CURRICULUM.phases))
    config = LanguageTraining(output=str(tmp_path / "run"), **SETTINGS | {"curriculum": plain})
    assert train_language_model(model, tokens, config).steps == 12
    staged = LanguageTraining(output=str(tmp_path / "other"), **SETTINGS)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has none that can be set"):
        train_language_model(model, tokens, staged)


def test_text_that_is_too_short_is_refused_before_anything_is_written(tokens, tmp_path):
    long = Curriculum(phases=(Phase(steps=2, length=100_000, batch=2, learning_rate=1.0),))
    with pytest.raises(ValueError, match=r"the training split has .* tokens and phase 1 reads rows of 100,000"):
        run(tmp_path / "run", tokens, curriculum=long)
    with pytest.raises(ValueError, match=r"the dev split has .* less than one row of 1,000"):
        run(tmp_path / "run", tokens, dev_length=1000)
    assert not (tmp_path / "run").exists()


def test_gradient_checkpoints_change_nothing_but_memory(finished, tokens, tmp_path):
    done, _, _ = run(tmp_path / "run", tokens, gradient_checkpointing=True)
    assert [entry["step"] for entry in curve(done)] == [entry["step"] for entry in curve(finished[0])]
    assert done.bits == pytest.approx(finished[0].bits, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1; got 0"),
        ({"dev_tokens": 0}, "dev_tokens must be at least 1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be greater than 0"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LanguageTraining(output="run", **SETTINGS | changes)


def test_history_is_json(finished):
    assert json.loads((finished[0].model / "training.json").read_text())["unit"] == "character"


def test_sharded_weights_need_processes_that_were_started_together(tokens, tmp_path):
    with pytest.raises(ValueError, match=r"shard_weights is for processes that share.*torchrun"):
        run(tmp_path / "run", tokens, shard_weights=True)
    assert not (tmp_path / "run").exists()
