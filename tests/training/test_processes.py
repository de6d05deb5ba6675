"""Language models trained by several processes: the loss curve of one, whoever computes which part of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.distributed.ranks import on_ranks
from tests.training.language_run import make_tokens
from tests.training.processes_run import train, train_and_die
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return str(make_tokens(tmp_path_factory.mktemp("text")).folder)


def trained(world, output, tokens, changes=None, stop=None, name="run"):
    """What the first rank found."""
    folder = output / f"{world} at {time.monotonic_ns()}"
    folder.mkdir()
    return on_ranks(world, folder, train, world, str(output / name), tokens, changes or {}, stop)[0]


@pytest.fixture(scope="module")
def alone(tokens, tmp_path_factory):
    return trained(1, tmp_path_factory.mktemp("alone"), tokens)


def same_curve(found, expected):
    assert isinstance(found, list), found
    assert len(found) == len(expected)
    for entry, other in zip(found, expected, strict=True):
        assert entry["step"] == other["step"]
        for name in {"loss", "eval_loss", "grad_norm", "learning_rate", "tokens_seen"} & set(other):
            digits = 1e-6 if name == "loss" else 1e-10  # which the Trainer adds up in float32
            assert entry[name] == pytest.approx(other[name], rel=digits), (entry["step"], name)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (3, {"sequence_parallel": 3, "gradient_checkpointing": True}),  # rows of 16 and 32 tokens
        (2, {"accumulate": 1}),
        (4, {"sequence_parallel": 2, "accumulate": 1}),
        (4, {"sequence_parallel": 2, "accumulate": 1, "shard_weights": True, "gradient_checkpointing": True}),
    ],
    ids=["a row on three", "rows on two", "both", "weights too"],
)
def test_several_processes_have_the_loss_curve_of_one(world, changes, tokens, alone, tmp_path):
    same_curve(trained(world, tmp_path, tokens, changes), alone)


@pytest.mark.parametrize("shard_weights", [False, True], ids=["whole weights", "sharded weights"])
def test_a_run_goes_on_with_other_processes(shard_weights, tokens, alone, tmp_path):
    def on(world, stop=None):
        changes = {"sequence_parallel": world, "shard_weights": shard_weights}
        return trained(world, tmp_path, tokens, changes, stop)

    assert on(2, stop=4) == "Stopped: before step 4"
    assert on(1, stop=7) == "Stopped: before step 7"
    same_curve(on(3), alone)
    written_by_three = [path.parent.name for path in (tmp_path / "run").glob("checkpoint-*/rng_state_2.pth")]
    assert sorted(written_by_three) == ["checkpoint-12", "checkpoint-9"]


def shares(rank, *run):
    model = train(rank, *run, give_model=True)
    kept = {id(weight): weight for weight in model.parameters()}.values()
    return sum(weight.to_local().numel() for weight in kept), model.num_parameters()


def test_each_process_keeps_its_share_of_the_weights(tokens, tmp_path):
    changes = {"sequence_parallel": 2, "shard_weights": True}
    (first, whole), (second, _) = on_ranks(2, tmp_path, shares, 2, str(tmp_path / "run"), tokens, changes)
    assert first == second == whole / 2


def test_dropout_draws_the_same_for_a_run_that_goes_on_and_other_masks_on_each_process(tokens, alone, tmp_path):
    changes = {"sequence_parallel": 2, "dropout": 0.3}
    whole = trained(2, tmp_path, tokens, changes, name="whole")
    assert trained(2, tmp_path, tokens, changes, stop=7) == "Stopped: before step 7"
    same_curve(trained(2, tmp_path, tokens, changes), whole)
    assert whole[0]["loss"] != alone[0]["loss"]


def test_processes_that_do_not_fit_are_told_so_on_each(tokens, tmp_path):
    said = [
        trained(2, tmp_path, tokens, {"sequence_parallel": 3}),
        trained(2, tmp_path, tokens, {"sequence_parallel": 2, "last_rank": {"seed": 1, "weight_decay": 0.5}}),
        trained(2, tmp_path, tokens, {"last_rank": {"sequence_parallel": 2}}),
        trained(2, tmp_path, tokens, {"sequence_parallel": 2, "dev_length": 1}),
    ]
    for text, expected in zip(
        said,
        (
            "ValueError: sequence_parallel is 3, so the number of processes must be a multiple of 3; this run has 2",
            "ValueError: the processes of a run must be started with the same arguments; rank 0 has weight_decay 0.01, "
            "seed 0, and others have not",
            "same arguments; rank 0 has sequence_parallel 1, and others have not",
            "ValueError: sequence_parallel is 2, but there are rows of 1 tokens, fewer than processes",
        ),
        strict=True,
    ):
        assert expected in text
    assert not (tmp_path / "run").exists()


def test_a_killed_process_ends_the_others_at_once_and_the_restarted_run_goes_on(tokens, alone, tmp_path, monkeypatch):
    """As `torchrun --nproc-per-node 2 --max-restarts 1` does it."""
    # Else the processes that are started again look for the addresses of those before them (pytorch issue 135712).
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="test",
        max_restarts=1,
        monitor_interval=3,  # so that the other process speaks before it is ended
        start_method="forkserver",
    )
    elastic_launch(launch, train_and_die)(str(tmp_path / "run"), tokens, 1, 7)
    killed, finished = (tmp_path / "run.0.said").read_text().splitlines()
    assert killed.startswith("ConnectionError: another process of this run has ended")
    assert "goes on from its last checkpoint" in killed and finished == "finished"
    same_curve(json.loads((tmp_path / "run.json").read_text()), alone)


def test_the_command_under_torchrun(tmp_path):
    (tmp_path / "book.txt").write_text("the old zoo is near the river " * 60)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.processes_run", "train", "lm", "--recipe", "small", "--data", "book.txt"]
    command += ["--sequence-parallel", "2", "--output", "run", "--save-steps", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote run/model") == 1 and done.stderr.count("train: ") == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
