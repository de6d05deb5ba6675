"""A tiny run of `train_language_model` on one rank of several, and the tests' `longspan` command.

python -m tests.training.processes_run ARGUMENTS: the command, with a recipe "small".
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tests.training.language_run import SETTINGS, kill_at, small_model

from longspan.recipes import language_models
from longspan.recipes.language_models import LanguageRecipe, tiny_stages
from longspan.training.language import LanguageTraining, train_language_model
from longspan.training.language_trainer import LanguageTrainer
from longspan.training.masked import MaskedTraining, train_masked
from longspan.training.token_files import load_token_files


class Stopped(Exception):
    """A run that was stopped before its end."""


def train(
    rank: int,
    world: int,
    output: str,
    tokens: str,
    changes: dict[str, Any],
    stop: int | None = None,
    give_model: bool = False,
) -> Any:
    """The run's history, or its model, or what was wrong with it. Stops on all ranks before step `stop`."""
    as_launched(rank, world)
    if stop is not None:
        stop_at(stop)
    files = load_token_files(tokens)
    dropout = changes.get("dropout", 0.0)
    model = small_model(len(files.tokenizer)).double()
    if rank:  # only the first process's weights count
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = dropout
    own = {name: value for name, value in changes.items() if name not in ("dropout", "last_rank")}
    own |= changes.get("last_rank", {}) if rank == world - 1 else {}
    config = LanguageTraining(output=output, **SETTINGS | {"bf16": False, "dev_length": 16} | own)
    try:
        history = train_language_model(model, files, config).history
        return model if give_model else history
    except (ValueError, OSError, Stopped) as error:
        return f"{type(error).__name__}: {error}"


def train_masked_on(rank: int, world: int, config: MaskedTraining) -> tuple[list[float], str]:
    """The losses of a run, and where its model is."""
    as_launched(rank, world)
    done = train_masked(config)
    return [entry["loss"] for entry in done.history if "loss" in entry], str(done.model)


def as_launched(rank: int, world: int) -> None:
    """The variables that torchrun sets."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost"}


def stop_at(step: int) -> None:
    whole = LanguageTrainer.training_step

    def training_step(self: Any, *inputs: Any, **named: Any) -> Any:
        if self.state.global_step == step:
            raise Stopped(f"before step {step}")
        return whole(self, *inputs, **named)

    LanguageTrainer.training_step = training_step


def train_and_die(output: str, tokens: str, rank_to_kill: int, step: int) -> Any:
    """A worker of torch.distributed.run, killed at its first start."""
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == rank_to_kill and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        kill_at(step)
    found = train(rank, world, output, tokens, {"sequence_parallel": 2})
    with Path(f"{output}.{rank}.said").open("a") as file:
        file.write(f"{found if isinstance(found, str) else 'finished'}\n")
    if isinstance(found, str):
        raise SystemExit(2)
    if rank == 0:
        Path(f"{output}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    from longspan.cli import main

    stages = tiny_stages(tokens=600, tokens_per_step=64, length=32, learning_rate=1e-2, windows=(4, 8), shares=(1,))
    recipe = LanguageRecipe(model=small_model, curriculum=stages, about="for tests")
    language_models.RECIPES["small"] = lambda: recipe
    main(sys.argv[1:])
