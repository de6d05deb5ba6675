"""Training of language models on transformers.Trainer: all phases of a curriculum in one run, with one optimizer.

A killed run is started again with the same arguments and ends as if it had not been.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from safetensors.torch import load_model
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from longspan.distributed import shard, unshard
from longspan.distributed.processes import (
    check_same_everywhere,
    first_process_first,
    join_processes,
    lost_processes_told,
)
from longspan.inference.evidence import uses_bf16
from longspan.inference.run_folder import remember
from longspan.models.convert import whole_or_absent
from longspan.training.curriculum import Curriculum, set_windows
from longspan.training.curves import draw_curves, require_matplotlib
from longspan.training.language_trainer import LanguageTrainer, Phases, Progress
from longspan.training.runs import newest_checkpoint, tensorboard
from longspan.training.settings import trainer_arguments
from longspan.training.token_files import TokenFiles
from longspan.training.token_rows import Objective, TrainingRows, dev_batches, next_token

# Of the settings, what changes no step: a run may go on with others.
UNIMPORTANT = ("output", "log_steps", "sequence_parallel", "timeout_seconds")


@dataclass(frozen=True, kw_only=True)
class LanguageTraining:
    """Everything that decides a training run but model, text and objective.

    output: directory of the run: checkpoints, TensorBoard's files, curves.png and at last the model; a run that is
    there goes on.
    accumulate: batches that a step's rows are computed in, to save memory.
    dev_tokens: how much of the dev split is read every evaluate_steps, in rows of dev_length tokens (None: as long as
    those of the last phase). The rows are read by themselves: the figure of `longspan evaluate lm` is better.
    bf16: autocast; None for where the processor has instructions for it.
    sequence_parallel: processes that share each row, a stretch of its tokens each; all processes are groups of so many.
    shard_weights: each process keeps its share of the weights, gradients and optimizer (FSDP), and gathers a layer's
    weights when it computes it.
    timeout_seconds: how long a process waits for another.
    """

    output: str
    curriculum: Curriculum
    accumulate: int = 1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    dev_tokens: int = 262_144
    dev_length: int | None = None
    evaluate_steps: int = 500
    save_steps: int = 200
    log_steps: int = 20
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    sequence_parallel: int = 1
    shard_weights: bool = False
    timeout_seconds: int = 60
    seed: int = 0

    def __post_init__(self):
        numbers = ("accumulate", "dev_tokens", "evaluate_steps", "save_steps", "log_steps")
        for name in (*numbers, "sequence_parallel", "timeout_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be greater than 0; got {self.max_grad_norm}")
        object.__setattr__(self, "betas", tuple(self.betas))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers of at least 0 and below 1; got {self.betas}")


@dataclass(frozen=True, kw_only=True)
class TrainedLanguageModel:
    """A finished run.

    model: its directory, with the tokenizer. bits: on dev, per `unit`, of rows read by themselves.
    tokens_per_second: the median over the run's log. peak_memory_gib: of the process.
    """

    model: Path
    bits: float
    unit: str
    steps: int
    tokens: int
    tokens_per_second: float
    peak_memory_gib: float
    history: list[dict[str, Any]]


def train_language_model(
    model: Any,
    tokens: TokenFiles,
    config: LanguageTraining,
    objective: Objective | None = None,
    *,
    finish: Callable[[Any], None] = lambda model: None,
    tell: Callable[[str], None] = lambda line: None,
) -> TrainedLanguageModel:
    """Trains, or goes on with, the run that `config` describes.

    model: any model of transformers or ours whose forward takes `input_ids` and `labels` and gives `loss`. It holds the
    trained weights afterwards, with `shard_weights` this process's share of them. objective: None for `next_token()`.
    finish: what is done to the model after training. tell: is called with a line for each phase before the run, and
    with one for each entry of the log.
    Under torchrun or `accelerate launch` every process takes its share of each step. The loss is that of one process,
    and a run goes on with any number of them.
    Raises ValueError for text that is shorter than a row, windows that the model lacks, processes that do not fit and a
    folder with another run, NotImplementedError for a model whose rows cannot be shared, FileExistsError for a folder
    with something else, ConnectionError where another process is gone, ImportError where `pip install longspan[train]`
    is missing.
    """
    require_matplotlib()
    join_processes(config.timeout_seconds)
    with lost_processes_told(config.timeout_seconds):
        return _train(model, tokens, config, objective or next_token(), finish, tell)


def _train(
    model: Any,
    tokens: TokenFiles,
    config: LanguageTraining,
    objective: Objective,
    finish: Callable[[Any], None],
    tell: Callable[[str], None],
) -> TrainedLanguageModel:
    curriculum, output = config.curriculum, Path(config.output)
    arguments = _arguments(config, model, objective)
    decides = {name: value for name, value in asdict(config).items() if name not in UNIMPORTANT}
    decides |= {
        "bf16": arguments.bf16,
        "processes": arguments.world_size,
        "model": _described(model),
        "objective": objective.counted,
        "text": tokens.fingerprint,
    }
    check_same_everywhere(decides | {"sequence_parallel": config.sequence_parallel})
    _check_processes(config, arguments.world_size)
    shares = arguments.world_size // config.sequence_parallel  # of a step's rows
    if config.gradient_checkpointing:  # which newer releases of transformers call so
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    # Every item is a whole batch, because the phases' batches differ in shape.
    arguments.max_steps = curriculum.steps
    rows = TrainingRows(
        tokens.splits["train"],
        curriculum,
        objective,
        parts=config.accumulate * shares,
        seed=config.seed,
        shards=config.sequence_parallel,
    )
    last = curriculum.phases[-1]
    length = config.dev_length or last.length
    dev_rows = max(1, last.batch * last.length // (length * config.accumulate * shares))
    dev = dev_batches(
        tokens.splits["dev"], length, dev_rows, config.dev_tokens, objective, shards=config.sequence_parallel
    )
    causal = objective.added == 0
    share = len(tokens.splits["dev"]) / tokens.units["dev"] if causal else 1.0
    trainer = LanguageTrainer(
        shard_weights=config.shard_weights,
        bits=share / math.log(2),
        curriculum=curriculum,
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=dev,  # pyright: ignore[reportArgumentType]
        data_collator=lambda items: items[0],
        callbacks=[Phases(curriculum, config.seed)],
    )
    for talkative in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(talkative)
    done = output / "model" / "training.json"
    with arguments.main_process_first(local=False):
        remember(output, decides, may_differ=("processes",))
    if not done.is_file():
        newest = newest_checkpoint(output, None)
        if trainer.is_world_process_zero():
            for line in cost_lines(curriculum, model):
                tell(line)
            if newest is not None:
                tell(f"going on from {newest.name}")
            trainer.add_callback(tensorboard(output, newest))
            unit = tokens.unit if causal else objective.counted
            trainer.add_callback(Progress(curriculum, unit, tell))
        if config.sequence_parallel > 1:
            wait = timedelta(seconds=config.timeout_seconds)
            groups: Any = dist.new_subgroups(config.sequence_parallel, timeout=wait)
            shard(model, groups[0])
        try:
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        finally:
            unshard(model)
        finish(model)
        weights = trainer.accelerator.get_state_dict(trainer.model)
        with first_process_first():
            if trainer.is_world_process_zero():
                _write(trainer, weights, tokens, config, decides, causal, objective.counted)
    if not isinstance(model, FSDPModule):
        load_model(model, output / "model" / SAFE_WEIGHTS_NAME)
    if last.windows is not None:
        set_windows(model, last.windows)
    found = json.loads(done.read_text(encoding="utf-8"))
    names = ("bits", "unit", "steps", "tokens", "tokens_per_second", "peak_memory_gib", "history")
    return TrainedLanguageModel(model=output / "model", **{name: found[name] for name in names})


def cost_lines(curriculum: Curriculum, model: Any) -> list[str]:
    """The schedule in words, a line for each phase and one for all: what is trained on, and what it costs."""
    lines = []
    table = curriculum.table(model)
    for row, phase in zip(table, curriculum.phases, strict=True):
        windows = "" if row["windows"] is None else f", windows {row['windows'][0]:,} to {row['windows'][-1]:,}"
        rate = f"{phase.learning_rate:.3g}"
        if phase.final_learning_rate is not None:
            rate += f" to {phase.final_learning_rate:.3g}"
        lines.append(
            f"phase {row['phase']}: {row['steps']:,} steps of {row['batch']:,} x {row['length']:,} tokens{windows}, "
            f"learning rate {rate}: {row['tokens'] / 1e6:,.2f} M tokens, {row['operations'] / 1e15:,.3f} Pflop"
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    operations = sum(row["operations"] for row in table)
    lines.append(
        f"in all: {curriculum.steps:,} steps, {curriculum.tokens / 1e6:,.2f} M tokens, {operations / 1e15:,.3f} Pflop "
        f"for {parameters / 1e6:,.1f} M parameters"
    )
    return lines


def _check_processes(config: LanguageTraining, processes: int) -> None:
    """ValueError where the processes make no groups of `sequence_parallel`, a row is too short for one, or shares of
    the weights have no processes to lie on."""
    size = config.sequence_parallel
    if processes % size:
        raise ValueError(
            f"sequence_parallel is {size}, so the number of processes must be a multiple of {size}; this run has "
            f"{processes}. Start it with `torchrun --nproc-per-node {size}`, for example"
        )
    lengths = [phase.length for phase in config.curriculum.phases]
    shortest = min(lengths if config.dev_length is None else [*lengths, config.dev_length])
    if shortest < size:
        raise ValueError(f"sequence_parallel is {size}, but there are rows of {shortest} tokens, fewer than processes")
    if config.shard_weights and not dist.is_initialized():
        raise ValueError(
            "shard_weights is for processes that share the weights: start the run with `torchrun --nproc-per-node N`, "
            "where N may be 1 for a run that goes on with fewer"
        )


def _arguments(config: LanguageTraining, model: Any, objective: Objective) -> TrainingArguments:
    return trainer_arguments(
        config.output,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=max(phase.learning_rate for phase in config.curriculum.phases),
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_epsilon=config.epsilon,
        max_grad_norm=config.max_grad_norm,
        bf16=uses_bf16(config.bf16, model.device),
        train_sampling_strategy="sequential",  # the rows come in the run's order
        eval_strategy="steps",
        eval_steps=config.evaluate_steps,
        prediction_loss_only=True,
        save_steps=config.save_steps,
        logging_steps=config.log_steps,
        disable_tqdm=True,
        seed=config.seed,
        ddp_timeout=config.timeout_seconds,
        ddp_find_unused_parameters=objective.added > 0,  # masked models' global projections, where no token is global
    )


def _described(model: Any) -> dict[str, Any]:
    """A model's configuration without what changes from phase to phase and from machine to machine."""
    described = model.config.to_dict()
    changing = ("windows", "use_cache", "_name_or_path", "transformers_version", "dtype", "torch_dtype")
    return {name: value for name, value in described.items() if name not in changing} | {"class": type(model).__name__}


def _write(
    trainer: Trainer,
    weights: dict[str, Any],
    tokens: TokenFiles,
    config: LanguageTraining,
    decides: dict[str, Any],
    causal: bool,
    counted: str,
) -> None:
    """The model, its tokenizer and the run's figures into output/model, and the curves beside it."""
    history = trainer.state.log_history
    entries = [entry for entry in history if "tokens_per_second" in entry]
    speeds = sorted(entry["tokens_per_second"] for entry in entries)
    unit = tokens.unit if causal else counted
    summary = {
        "bits": next(entry["eval_bits"] for entry in reversed(history) if "eval_bits" in entry),
        "unit": unit,
        "steps": config.curriculum.steps,
        "tokens": config.curriculum.tokens,
        "tokens_per_second": speeds[len(speeds) // 2],
        "peak_memory_gib": max(entry["memory_gib"] for entry in entries),
        "run": decides,
        "history": history,
    }
    output, model = Path(config.output), cast(PreTrainedModel, trainer.model)
    starts, seen = [], 0
    for phase in config.curriculum.phases[:-1]:
        seen += phase.tokens
        starts.append(seen)
    draw_curves({output.name: history}, output / "curves.png", unit=unit, phases=starts)
    with whole_or_absent(output / "model") as folder:
        model.save_pretrained(folder, state_dict=weights)
        tokens.tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
