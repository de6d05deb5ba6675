"""Fine-tuning of a classifier on transformers.Trainer: the best checkpoint wins, and a killed run goes on.

n rows, L labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_model
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from longspan.inference.run_folder import remember
from longspan.models.convert import whole_or_absent
from longspan.training.runs import Features, fingerprint, in_order, newest_checkpoint, tensorboard
from longspan.training.settings import TrainerSettings

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining(TrainerSettings):
    """Everything that decides a training run but model and rows.

    output: directory of the run: checkpoints, TensorBoard's files and at last the model; a run that is there goes on.
    metric: what the best checkpoint is best in, a key of what `measure` gives; larger is better.
    """

    output: str
    metric: str = "accuracy"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run. model: directory of the best model; metrics: its figures on dev, from step best_step of steps."""

    model: Path
    metrics: dict[str, float]
    best_step: int
    steps: int


def train_classifier(
    model: Any,
    tokenizer: Any,
    train: Features,
    dev: Features,
    measure: Callable[[Array], Mapping[str, float]],
    config: ClassifierTraining,
) -> Trained:
    """Trains, or goes on with, the run that `config` describes.

    model: any model of transformers or ours whose forward takes the rows' names and gives `loss` and `logits`. It holds
    the best weights afterwards.
    train, dev: rows as `longspan.tasks.task.tokenize` makes them, with labels. measure: logits [n, L] in dev's order ->
    figures.
    A run that was killed goes on from its newest whole checkpoint and ends as if it had not been. One that is finished
    is not repeated. Under torchrun or `accelerate launch` every process takes its share of each step.
    Raises ValueError for no rows, rows without labels and a folder with another run, FileExistsError for a folder with
    something else, ImportError where `pip install longspan[train]` is missing.
    """
    for name, rows in (("train", train), ("dev", dev)):
        if not rows:
            raise ValueError(f"there are no {name} rows")
        unlabelled = sum("labels" not in row for row in rows)
        if unlabelled:
            raise ValueError(f"{unlabelled} of {len(rows)} {name} rows have no label")
    output = Path(config.output)
    order = np.argsort([-len(row["input_ids"]) for row in dev], kind="stable")  # long rows together: less padding

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
        back = np.empty_like(logits)
        back[order] = logits
        figures = dict(measure(back))
        if config.metric not in figures:
            raise ValueError(f"metric {config.metric!r} is not measured; there is {', '.join(figures)}")
        return figures

    arguments = config.arguments(
        output,
        model,
        len(train),
        eval_strategy="steps",
        metric_for_best_model=config.metric,
        greater_is_better=True,
    )
    steps, rows_a_step = arguments.max_steps, config.rows_a_step(arguments)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=in_order(train, steps, config.batch, rows_a_step, config.seed),  # pyright: ignore
        eval_dataset=[dev[place] for place in order],  # pyright: ignore
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
        callbacks=[_SaveWhatIsMeasured()],
    )
    done = output / "model" / "training.json"
    decides = {name: value for name, value in asdict(config).items() if name not in ("output", "log_steps")}
    decides |= {
        "bf16": arguments.bf16,
        "steps": steps,
        "processes": arguments.world_size,
        "model": type(model).__name__,
        "rows": fingerprint(train, dev),
    }
    with arguments.main_process_first(local=False):
        remember(output, decides)
    if not done.is_file():
        newest = newest_checkpoint(output, arguments.world_size)
        if trainer.is_world_process_zero():
            trainer.add_callback(tensorboard(output, newest))
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        if trainer.is_world_process_zero():
            _write_best(trainer, tokenizer, output, decides)
        trainer.accelerator.wait_for_everyone()
    load_model(model, output / "model" / SAFE_WEIGHTS_NAME)
    found = json.loads(done.read_text())
    return Trained(model=output / "model", metrics=found["metrics"], best_step=found["best_step"], steps=found["steps"])


def predict_logits(
    model: Any, features: Features, tokenizer: Any, *, batch: int = 32, bf16: bool = False
) -> NDArray[np.float32]:
    """Logits [n, L] of rows, in their order; rows of like length are computed together."""
    order = np.argsort([-len(row["input_ids"]) for row in features], kind="stable")
    collate = DataCollatorWithPadding(tokenizer)
    logits: list[Array] = []
    was_training = model.training
    model.eval()
    with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for first in range(0, len(order), batch):
            rows = [features[place] for place in order[first : first + batch]]
            inputs = collate([{name: row[name] for name in row if name != "labels"} for row in rows])
            inputs = {name: part.to(model.device) for name, part in inputs.items()}
            logits.append(model(**inputs).logits.float().cpu().numpy())
    model.train(was_training)
    back = np.empty((len(features), logits[0].shape[1] if logits else 0), np.float32)
    back[order] = np.concatenate(logits) if logits else 0
    return back


class _SaveWhatIsMeasured(TrainerCallback):
    """A checkpoint wherever dev is read, so that the best one is among them, beside those every save_steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= control.should_evaluate
        control.should_log |= control.should_save  # a mean of losses that a checkpoint cut would differ after a kill


def _write_best(trainer: Trainer, tokenizer: Any, output: Path, decides: dict[str, Any]) -> None:
    """The best checkpoint's weights into the model and, with the tokenizer and the run's figures, into output/model."""
    state = trainer.state
    model: Any = trainer.model
    load_model(model, output / f"checkpoint-{state.best_global_step}" / SAFE_WEIGHTS_NAME)
    best = next(
        entry
        for entry in state.log_history
        if entry["step"] == state.best_global_step and f"eval_{decides['metric']}" in entry
    )
    names = sorted(name for name in best if name.startswith("eval_"))
    hidden = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
    figures = {name.removeprefix("eval_"): best[name] for name in names if name not in hidden}
    with whole_or_absent(output / "model") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        summary = {"metrics": figures, "best_step": state.best_global_step, "steps": state.max_steps, "run": decides}
        (folder / "training.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
