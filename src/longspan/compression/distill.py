"""Distillation: a student learns to answer as its teacher does, on transformers.Trainer.

Shapes: B batch, N tokens, C model width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from longspan.compression.distillation_loss import DistillationLoss
from longspan.compression.readings import inputs_of, num_layers, read, token_mask_of, width
from longspan.compression.teacher_outputs import (
    LABELS,
    Collate,
    Features,
    TeacherOutputs,
    compute_teacher_outputs,
    hash_of_model,
)
from longspan.inference.run_folder import remember
from longspan.models.convert import as_ours, whole_or_absent
from longspan.models.evidence import LongspanForEvidence
from longspan.models.plug_in import PLACES
from longspan.training.runs import fingerprint, in_order, newest_checkpoint, tensorboard
from longspan.training.settings import TrainerSettings

Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Distillation(TrainerSettings):
    """How a student is trained.

    metric: the value of `evaluate` that the best checkpoint is best in, larger is better; None: its first.
    keep: what of the teacher is computed once and kept on disk: "logits", where the loss compares nothing else, "all"
        that it compares, or "nothing". What is not kept the teacher computes for every batch, beside the student.
    """

    loss: DistillationLoss = field(default_factory=DistillationLoss)
    batch: int = 32
    learning_rate: float = 5e-5
    metric: str | None = None
    keep: Literal["logits", "all", "nothing"] = "logits"

    def __post_init__(self):
        super().__post_init__()
        if self.keep not in ("logits", "all", "nothing"):
            raise ValueError(f"keep must be 'logits', 'all' or 'nothing'; got {self.keep!r}")


class Rows(NamedTuple):
    """The same examples for the student and, where it splits texts otherwise, for the teacher, each with its padding.

    features: not padded: input_ids, attention_mask, labels, ... collate: pads a list of them, such as transformers'
    DataCollatorWithPadding. teacher_features: None: the student's. Pass the very same list to say that two models with
    vocabularies of unequal size read the same tokens.
    """

    features: Features
    collate: Collate
    teacher_features: Features | None = None
    teacher_collate: Collate | None = None

    @property
    def for_teacher(self) -> tuple[Features, Collate]:
        features = self.features if self.teacher_features is None else self.teacher_features
        return features, self.collate if self.teacher_collate is None else self.teacher_collate

    @property
    def shares_tokens(self) -> bool:
        return self.teacher_features is None or self.teacher_features is self.features


def distill(
    teacher: Any,
    student: Any,
    rows: Rows,
    output: str | Path,
    settings: Distillation | None = None,
    *,
    evaluate: Evaluate | None = None,
    cache: str | Path | None = None,
) -> Any:
    """The trained student, which is also written to output/model; the given one learns in place.

    teacher, student: transformers models, ours or others, for sequence classification or question answering; base
        models, where the loss has logits=0; or two `LongspanForEvidence`, whose window scores are compared, with
        keep="nothing".
    output: folder of checkpoints, TensorBoard's files (output/tensorboard) and the model. Called again with the same
        arguments, a killed run goes on from its newest checkpoint and ends with the same weights; a finished one is
        loaded.
    evaluate: the metrics of a student; the checkpoint that does best is the result. None: the last one is.
    cache: folder of teacher outputs, which students can share; output/teacher by default.
    Raises ValueError for models or rows that do not fit each other or the loss, and for an output of another run;
    FileExistsError for one that holds something else; ImportError where `pip install longspan[train]` is missing.
    """
    settings, output = settings or Distillation(), Path(output)
    loss = settings.loss
    _check(teacher, student, rows, loss)
    if loss.relations and teacher.config.model_type in PLACES:
        teacher = as_ours(teacher)  # whose projections are known, and laid out as [B, N, H*D]
    # The others wait while one process asks the teacher.
    arguments = settings.arguments(output, student, len(rows.features), ddp_timeout=24 * 3600)
    steps, rows_a_step = arguments.max_steps, settings.rows_a_step(arguments)
    if evaluate is not None:
        arguments.eval_strategy, arguments.metric_for_best_model, arguments.greater_is_better = "steps", "decides", True
    pairs = loss.layers(num_layers(student), num_layers(teacher)) if loss.hidden_states or loss.relations else ()
    of_student, of_teacher = loss.wanted(pairs)
    kept = None
    with arguments.main_process_first(local=False):
        decides = {name: value for name, value in asdict(settings).items() if name != "log_steps"}
        decides |= {"bf16": arguments.bf16, "steps": steps, "processes": arguments.world_size}
        decides |= {"teacher": hash_of_model(teacher), "student": hash_of_model(student)}
        remember(output, decides | {"rows": fingerprint(map(dict, rows.features))})
        if (output / "model").exists():
            return type(student).from_pretrained(output / "model")
        if settings.keep == "all" or (settings.keep == "logits" and not of_teacher):
            features, collate = rows.for_teacher
            kept = compute_teacher_outputs(
                teacher,
                features,
                output / "teacher" if cache is None else cache,
                collate=collate,
                wanted=of_teacher,
                batch=settings.batch,
                bf16=arguments.bf16,
            )
    torch.manual_seed(settings.seed)  # of the projections: a resumed run starts from the same ones
    pupil = _Pupil(student, loss.projections(pairs, width(student), width(teacher)), loss, pairs, of_student)
    numbered = [{"input_ids": row["input_ids"], "number": number} for number, row in enumerate(rows.features)]
    trainer = _DistillationTrainer(
        model=pupil,
        args=arguments,
        train_dataset=in_order(numbered, steps, settings.batch, rows_a_step, settings.seed),  # type: ignore[arg-type]
        eval_dataset=None if evaluate is None else rows.features,  # type: ignore[arg-type]
        data_collator=_Collator(rows, kept),
    )
    trainer.judge, trainer.metric = evaluate, settings.metric
    if kept is None:
        trainer.teacher, trainer.of_teacher = teacher.eval().to(arguments.device), of_teacher
    newest = newest_checkpoint(output, arguments.world_size)
    if trainer.is_world_process_zero():
        trainer.add_callback(tensorboard(output, newest))
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    if evaluate is not None:
        load_model(pupil, output / f"checkpoint-{trainer.state.best_global_step}" / SAFE_WEIGHTS_NAME)
    student.eval()
    if trainer.is_world_process_zero():
        with whole_or_absent(output / "model") as folder:
            student.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
    return student


class _Pupil(nn.Module):
    """The student and what carries its hidden states to the teacher's width, which is not saved with it."""

    def __init__(self, student: nn.Module, projections: nn.ModuleDict, loss: DistillationLoss, pairs: Any, wanted: Any):
        super().__init__()
        self.student, self.projections = student, projections
        self.described, self.pairs, self.wanted = loss, pairs, wanted

    def forward(self, batch: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = inputs_of(batch, self.student, labels=bool(self.described.hard_labels))
        readings, output = read(self.student, inputs, self.wanted)
        return self.described.terms(
            readings,
            teacher,
            token_mask=token_mask_of(batch),
            pairs=self.pairs,
            projections=self.projections,
            own_loss=getattr(output, "loss", None),
        )


class _Collator(NamedTuple):
    """Numbers of rows -> what the student reads of them, and what is known of the teacher."""

    rows: Rows
    kept: TeacherOutputs | None

    def __call__(self, numbered: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = [row["number"] for row in numbered]
        batch = dict(self.rows.collate([dict(self.rows.features[number]) for number in numbers]))
        if self.kept is None:
            return {"batch": batch, "teacher": {}}
        token_mask = token_mask_of(batch)
        if not self.rows.shares_tokens:  # values of whole rows only, so any layout of the teacher's tokens will do
            features, _ = self.rows.for_teacher
            lengths = torch.tensor([len(features[number]["input_ids"]) for number in numbers])
            token_mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return {"batch": batch, "teacher": self.kept.batch(numbers, token_mask)}


class _DistillationTrainer(Trainer):
    """Trainer whose batches bring the teacher's outputs along, and that logs every term of the loss.

    teacher, of_teacher: who reads every batch, and what is read of it; None where the batches say it all.
    judge, metric: gives the student's figures, and which of them decides.
    """

    loss_is_scaled_for_ga = False
    teacher: nn.Module | None = None
    of_teacher: Sequence[str] = ()
    judge: Evaluate | None = None
    metric: str | None = None

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.sums: dict[str, float] = defaultdict(float)
        self.batches = 0

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch, readings = inputs["batch"], inputs["teacher"]
        if self.teacher is not None:
            with torch.no_grad(), torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
                readings, _ = read(self.teacher, inputs_of(batch, self.teacher, labels=False), self.of_teacher)
        terms = model(batch, readings)
        self.batches += 1
        for name, value in terms.items():
            self.sums[name] += float(value.detach())
        loss = torch.stack([value.float() for value in terms.values()]).sum()
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.batches:
            logs |= {f"loss_{name}": total / self.batches for name, total in self.sums.items()}
            self.sums.clear()
            self.batches = 0
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        assert self.judge is not None and isinstance(self.model, _Pupil)
        student = self.model.student.eval()
        with torch.no_grad():
            found = dict(self.judge(student))
        name = self.metric or next(iter(found), None)
        if name not in found:
            raise ValueError(f"metric {name!r} is not measured; there is {', '.join(found) or 'nothing'}")
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in (found | {"decides": found[name]}).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_save = True  # so that the best one is among the checkpoints
        return metrics


def _check(teacher: Any, student: Any, rows: Rows, loss: DistillationLoss) -> None:
    if not len(rows.features):
        raise ValueError("there are no rows to distill with")
    if len(rows.for_teacher[0]) != len(rows.features):
        raise ValueError(
            f"teacher_features must hold the same examples: {len(rows.for_teacher[0])} rows for the teacher, "
            f"{len(rows.features)} for the student"
        )
    if loss.relations and any(isinstance(model, LongspanForEvidence) for model in (teacher, student)):
        raise NotImplementedError(
            "LongspanForEvidence reads a question twice, so its projections are not those of one row: "
            "set relations to 0"
        )
    vocabularies = (teacher.config.vocab_size, student.config.vocab_size)
    if rows.teacher_features is None and vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"teacher and student have different tokenizers ({vocabularies[0]:,} and {vocabularies[1]:,} tokens): pass "
            f"teacher_features, the same examples by the teacher's tokenizer"
        )
    answers_spans = any("QuestionAnswering" in type(model).__name__ for model in (teacher, student))
    if not rows.shares_tokens and (loss.needs_tokens or answers_spans):
        raise ValueError(
            "teacher and student split the texts into different tokens, so only logits of whole rows can be compared: "
            "set hidden_states, embeddings and relations to 0, and take classifiers"
        )
    if loss.logits:
        _check_labels(teacher.config, student.config)
    if loss.hard_labels:
        labels = [next((row[name] for name in LABELS if name in row), None) for row in rows.features]
        if any(label is None for label in labels):
            raise ValueError("hard_labels compares with labels, and the features hold none: set it to 0, or add labels")
        highest = max((row[name] for row in rows.features for name in ("labels", "label") if name in row), default=0)
        if isinstance(highest, int) and highest >= student.config.num_labels:
            raise ValueError(f"the features hold label {highest}; the student has {student.config.num_labels} labels")


def _check_labels(teacher: Any, student: Any) -> None:
    if teacher.num_labels != student.num_labels:
        raise ValueError(
            f"the teacher tells {teacher.num_labels} labels apart and the student {student.num_labels}: give the "
            f"student num_labels={teacher.num_labels}"
        )
    names = [list(config.id2label.values()) for config in (teacher, student)]
    if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
        raise ValueError(f"teacher and student number their labels differently: {names[0]} and {names[1]}")
    if teacher.problem_type == "multi_label_classification":
        raise NotImplementedError(
            "logits of several labels a row are no distribution over labels: set logits to 0 and use hard_labels or "
            "hidden_states"
        )
