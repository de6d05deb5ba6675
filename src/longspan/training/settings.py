"""What transformers.Trainer is told in the same way by every training."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from longspan.inference.evidence import uses_bf16
from longspan.kernels.memory import keep_freed_memory


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How a model learns from rows that it reads several times.

    epochs: passes over the rows; steps, optimizer steps, takes their place where it is given.
    batch: rows that a process computes at a time; a step has `accumulate` such batches of every process.
    warmup_fraction: of all steps, with a rising learning rate; afterwards it falls to 0 in a line.
    evaluate_steps: None for once a pass. bf16: None for where the processor has instructions for it.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 3e-5
    warmup_fraction: float = 0.06
    weight_decay: float = 0.01
    evaluate_steps: int | None = None
    save_steps: int = 200
    log_steps: int = 20
    bf16: bool | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "evaluate_steps", "save_steps", "log_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0; got {getattr(self, name)}")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction must be at least 0 and below 1; got {self.warmup_fraction}")

    def computes_in_bf16(self, model: Any) -> bool:
        """What `bf16` says, or where it says nothing, whether the model's device has instructions for it."""
        return uses_bf16(self.bf16, model.device)

    def rows_a_step(self, arguments: TrainingArguments) -> int:
        return self.batch * self.accumulate * arguments.world_size

    def arguments(self, output: str | Path, model: Any, rows: int, **options: Any) -> TrainingArguments:
        """For a training on so many rows, which come in the run's order. options: what else Trainer shall know."""
        arguments = trainer_arguments(
            output,
            per_device_train_batch_size=self.batch,
            per_device_eval_batch_size=2 * self.batch,
            gradient_accumulation_steps=self.accumulate,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            bf16=self.computes_in_bf16(model),
            train_sampling_strategy="sequential",
            save_steps=self.save_steps,
            logging_steps=self.log_steps,
            seed=self.seed,
            **options,
        )
        a_pass = rows / self.rows_a_step(arguments)
        arguments.max_steps = self.steps or ceil(self.epochs * a_pass)
        arguments.warmup_steps = round(self.warmup_fraction * arguments.max_steps)
        arguments.eval_steps = self.evaluate_steps or ceil(a_pass)
        return arguments


def trainer_arguments(output: str | Path, **options: Any) -> TrainingArguments:
    """TrainingArguments with what holds for every training here. ImportError says what to install."""
    keep_freed_memory()
    usual: dict[str, Any] = {
        "lr_scheduler_type": "linear",
        "save_total_limit": 2,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "use_cpu": not torch.cuda.is_available(),
    }
    try:
        return TrainingArguments(output_dir=str(output), **(usual | options))
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install longspan[train]") from error
