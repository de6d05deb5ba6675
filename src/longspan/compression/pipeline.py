"""A model made small in steps, with a row for each: how large it is then, and how good."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open

from longspan.compression.distill import Distillation, Evaluate, Rows, distill
from longspan.compression.prune import Pruning, prune
from longspan.compression.students import student_of
from longspan.compression.teacher_outputs import hash_of_model
from longspan.inference.run_folder import remember, write_whole
from longspan.models.convert import as_ours, whole_or_absent
from longspan.models.packed import Precision
from longspan.models.quantize import quantize_checkpoint


@dataclass(frozen=True, kw_only=True)
class CompressionData:
    """What steps read: rows to learn from, labeled calibration batches, and the teacher (None: the first model)."""

    rows: Rows | None = None
    calibration: Sequence[Mapping[str, Any]] = ()
    teacher: Any = None


class Step(Protocol):
    """One step. Called again after it was killed, or when it is done, it gives the same result."""

    @property
    def name(self) -> str: ...

    def apply(self, model: Any, data: CompressionData, folder: Path) -> Any:
        """The new model, which is also in folder/model."""
        ...


@dataclass(frozen=True, kw_only=True)
class Train:
    """Any training: run(model, folder) leaves the model in folder/model and goes on where it was killed."""

    run: Callable[[Any, Path], Any]
    name: str = "train"

    def apply(self, model: Any, data: CompressionData, folder: Path) -> Any:
        self.run(model, folder)
        return type(model).from_pretrained(folder / "model")


@dataclass(frozen=True, kw_only=True)
class Distill:
    """The model learns from the teacher. layers: of a new student, as `student_of` takes them; None: the model itself.

    evaluate: chooses the best checkpoint.
    """

    settings: Distillation = field(default_factory=Distillation)
    layers: int | Sequence[int] | None = None
    evaluate: Evaluate | None = None
    name: str = "distill"

    def apply(self, model: Any, data: CompressionData, folder: Path) -> Any:
        if data.rows is None:
            raise ValueError("distillation needs rows to learn from: CompressionData(rows=Rows(...))")
        # Training changes the student in place, and a later step may need what the teacher was.
        student = student_of(
            model, range(1, 1 + model.config.num_hidden_layers) if self.layers is None else self.layers
        )
        teacher = model if data.teacher is None else data.teacher
        cache = folder.parent / "teacher"  # one for all steps
        return distill(teacher, student, data.rows, folder, self.settings, evaluate=self.evaluate, cache=cache)


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Heads and units are cut by their importance on the calibration batches. precision: of measured costs."""

    pruning: Pruning
    precision: Precision | None = None
    name: str = "prune"

    def apply(self, model: Any, data: CompressionData, folder: Path) -> Any:
        ours = as_ours(model)
        remember(folder, {"pruning": asdict(self.pruning), "precision": self.precision, "model": hash_of_model(ours)})
        if not (folder / "model").exists():
            small = prune(ours, data.calibration, self.pruning, precision=self.precision)
            with whole_or_absent(folder / "model") as written:
                small.save_pretrained(written)
        return type(ours).from_pretrained(folder / "model")


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """The encoder is packed for inference; no step can follow."""

    precision: Precision = "int8"
    name: str = "quantize"

    def apply(self, model: Any, data: CompressionData, folder: Path) -> Any:
        ours = as_ours(model)
        remember(folder, {"precision": self.precision, "model": hash_of_model(ours)})
        if not (folder / "model").exists():
            before = folder / "before"
            shutil.rmtree(before, ignore_errors=True)  # of a killed run
            ours.save_pretrained(before)
            quantize_checkpoint(before, folder / "model", precision=self.precision)
            shutil.rmtree(before)
        return type(ours).from_pretrained(folder / "model")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The model after a step. bytes: of its weights; seconds: that the step took now, near 0 if it was done before."""

    step: str
    parameters: int
    bytes: int
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Compression:
    """model: the last one, as it is loaded from folder `saved`. rows: the model at the start and after every step."""

    model: Any
    saved: Path
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        metrics = sorted({name for row in self.rows for name in row.metrics})
        lines = [f"{'step':<16}{'parameters':>14}{'MiB':>9}" + "".join(f"{name:>14}" for name in metrics)]
        for row in self.rows:
            figures = "".join(f"{row.metrics[name]:>14.4f}" if name in row.metrics else f"{'':>14}" for name in metrics)
            lines.append(f"{row.step:<16}{row.parameters:>14,}{row.bytes / 2**20:>9.1f}{figures}")
        return "\n".join(lines)


def compress(
    model: Any, steps: Iterable[Step], data: CompressionData, output: str | Path, *, evaluate: Evaluate | None = None
) -> Compression:
    """The model after all steps, each kept in a folder of its own: output/1-distill, output/2-prune, ...

    evaluate: figures of a model, for the rows; they are kept, too. Called again with the same arguments, a killed call
    goes on within the step where it was. The rows are also written to output/report.json.
    Raises ValueError for no steps, what the steps raise, and ValueError where a folder holds another run.
    """
    steps, output = tuple(steps), Path(output)
    if not steps:
        raise ValueError("there are no steps: give at least one of Train, Distill, Prune and Quantize")
    data = replace(data, teacher=model if data.teacher is None else data.teacher)
    parameters = list(model.parameters())
    start = {"parameters": sum(p.numel() for p in parameters), "bytes": sum(p.nbytes for p in parameters)}
    rows = [Row(step="start", **start, seconds=0.0, metrics=_measure(model, evaluate, output / "start.json"))]
    folder = output
    for number, step in enumerate(steps, 1):
        begun, folder = time.perf_counter(), output / f"{number}-{step.name}"
        model = step.apply(model, data, folder)
        model.eval()
        seconds = time.perf_counter() - begun
        metrics = _measure(model, evaluate, folder / "model" / "metrics.json")
        rows.append(Row(step=step.name, **_size(folder / "model"), seconds=seconds, metrics=metrics))
    write_whole(output / "report.json", json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return Compression(model=model, saved=folder / "model", rows=tuple(rows))


def _measure(model: Any, evaluate: Evaluate | None, file: Path) -> dict[str, float]:
    if evaluate is None:
        return {}
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({name: float(value) for name, value in evaluate(model).items()}) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))


def _size(folder: Path) -> dict[str, int]:
    """Parameters and bytes of a saved model; the scales of packed matrices count as bytes only."""
    parameters, size = 0, 0
    for path in folder.glob("*.safetensors"):
        size += path.stat().st_size
        with safe_open(path, "pt") as file:
            for name in tuple(file.keys()):
                count = 1
                for length in file.get_slice(name).get_shape():
                    count *= length
                parameters += 0 if name.endswith(".scale") else count
    return {"parameters": parameters, "bytes": size}
