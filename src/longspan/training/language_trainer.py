"""transformers.Trainer for language models: the curriculum's rates, windows and random numbers, and what is logged."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from longspan.training.curriculum import Curriculum, set_windows
from longspan.training.memory import forget_peak_memory, peak_memory_gib


class LanguageTrainer(Trainer):
    """Logs bits, speed and memory."""

    def __init__(self, *, shard_weights: bool, bits: float, curriculum: Curriculum, **kwargs: Any):
        self.shard_weights = shard_weights
        # Embeddings may share their weight with a head, and only one unit of FSDP can have it.
        self.units = sorted({*(kwargs["model"]._no_split_modules or ())} - {"Embeddings"})
        super().__init__(**kwargs)
        # All labels count that are not -100: objectives hide the first of a row, not those of its later parts.
        self._loss_shifts_labels = False
        self.bits, self.curriculum = bits, curriculum
        self.read, self.since = 0, time.perf_counter()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.shard_weights:  # as accelerate does it for GPUs; torch's FSDP needs none
            from accelerate import PartialState
            from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

            state: Any = self.accelerator.state
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                state_dict_type="SHARDED_STATE_DICT",
                cpu_ram_efficient_loading=True,
                transformer_cls_names_to_wrap=self.units,
            )
            self.is_fsdp_enabled = True

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            chosen: Any = self.optimizer if optimizer is None else optimizer
            highest, rate = self.args.learning_rate, self.curriculum.rate
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: rate(step) / highest)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        forget_peak_memory(self.args.device)
        self.read, self.since = 0, time.perf_counter()
        return super().train(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        self.read += inputs["input_ids"].numel()
        return super().training_step(model, inputs, num_items_in_batch)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        began = time.perf_counter()
        figures = super().evaluate(*args, **kwargs)
        self.since += time.perf_counter() - began  # the speed is that of training
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in ("loss", "eval_loss"):
            if name in logs:
                logs[name.replace("loss", "bits")] = logs[name] * self.bits
                logs["tokens_seen"] = _tokens_seen(self.curriculum, self.state.global_step)
        if "loss" in logs and self.read:
            seconds = time.perf_counter() - self.since
            logs["tokens_per_second"] = round(self.read * self.args.world_size / seconds)
            logs["memory_gib"] = round(peak_memory_gib(self.args.device), 3)
            self.read, self.since = 0, time.perf_counter()
        super().log(logs, start_time)


class Phases(TrainerCallback):
    """The model's windows are those of the step's phase, what dropout draws is decided by the seed, the step and the
    process, and what a checkpoint would cut in two is logged before it."""

    def __init__(self, curriculum: Curriculum, seed: int):
        self.curriculum, self.seed = curriculum, seed
        self.windows: tuple[int, ...] | None = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._set(state.global_step, model)
        drawn = np.random.SeedSequence((self.seed, state.global_step, args.process_index)).generate_state(1, np.uint64)
        torch.manual_seed(int(drawn[0] >> 1))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._set(min(state.global_step, self.curriculum.steps - 1), model)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save
        if state.global_step >= self.curriculum.steps:
            control.should_evaluate = True

    def _set(self, step: int, model: Any) -> None:
        windows = self.curriculum.at(step)[1].windows
        if windows is not None and windows != self.windows:
            set_windows(getattr(model, "module", model), windows)
            self.windows = windows


class Progress(TrainerCallback):
    def __init__(self, curriculum: Curriculum, unit: str, tell: Callable[[str], None]):
        self.curriculum, self.unit, self.tell = curriculum, unit, tell

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if "eval_bits" in logs:
            self.tell(f"step {state.global_step:,}: dev {logs['eval_bits']:.4f} bits per {self.unit}")
        if "tokens_per_second" not in logs:
            return
        left = (self.curriculum.tokens - logs["tokens_seen"]) / max(1, logs["tokens_per_second"])
        phase = self.curriculum.at(state.global_step - 1)[0] + 1
        self.tell(
            f"step {state.global_step:,} of {self.curriculum.steps:,}, phase {phase}: loss {logs['loss']:.4f}, "
            f"{logs['bits']:.4f} bits per {self.unit}, {logs['tokens_per_second']:,} tokens/s, "
            f"{logs['memory_gib']:.2f} GiB, learning rate {logs['learning_rate']:.3g}, {left / 60:,.0f} min left"
        )


def _tokens_seen(curriculum: Curriculum, step: int) -> int:
    seen = 0
    for phase in curriculum.phases:
        steps = min(step, phase.steps)
        seen += steps * phase.batch * phase.length
        step -= steps
    return seen
