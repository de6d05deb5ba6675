"""The evidence reader made small: heads and feed-forward units cut, what is left taught by the whole reader, 8 bits.

Every row of the table is judged on the same questions, with its speed over whole documents. Each step is kept in a
folder of its own, and a killed recipe goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from longspan.compression.distill import Distillation, Rows, distill
from longspan.compression.distillation_loss import DistillationLoss
from longspan.compression.prune import Pruning, prune
from longspan.inference.reader import BUILT_IN
from longspan.inference.run_folder import write_whole
from longspan.models.convert import whole_or_absent
from longspan.models.evidence import LongspanForEvidence
from longspan.tasks.evidence import cache_for, evaluate_reader
from longspan.training.evidence_rows import load_articles
from longspan.training.packing import PackedRow, batch_rows
from longspan.training.reader import ReaderTraining, TrainingRows, calibrate, split_rows
from longspan.training.reading import read_held_out

CALIBRATION_ROWS = 64
HIDDEN_STATES = 300.0  # their mean squared distance is a few hundredths, a divergence of scores some units


@dataclass(frozen=True, kw_only=True)
class SmallReader:
    """heads, units: of the feed-forward, that are kept of a layer, on average over the layers."""

    name: str
    heads: int
    units: int


@dataclass(frozen=True, kw_only=True)
class Readers:
    """Everything that decides the recipe.

    output: folder of all steps. data: folder with boolq_articles, fever, multirc and xquad. model: directory of the
    reader that is made small; None for longspan's own.
    steps, batch: optimizer steps of each small reader, and rows of tokens_per_row tokens, later twice as many, in each.
    questions: of the dev split that all are judged on, a seeded sample; None for all. condition: see `evaluate_reader`.
    """

    output: str
    data: str
    model: str | None = None
    readers: tuple[SmallReader, ...] = (
        SmallReader(name="two thirds", heads=8, units=1024),
        SmallReader(name="half", heads=6, units=768),
    )
    steps: int = 600
    batch: int = 4
    tokens_per_row: int = 1024
    learning_rate: float = 3e-4
    calibrated: int = 100
    questions: int | None = None
    condition: Literal["as_is", "buried"] = "as_is"
    seed: int = 0

    @classmethod
    def quick(cls, output: str, data: str, **changes: Any) -> Readers:
        """Every step on a few rows, to see that all of them work. The figures mean nothing."""
        few: dict[str, Any] = {"steps": 4, "calibrated": 4, "questions": 8}
        return cls(output=output, data=data, **(few | changes))


@dataclass(frozen=True, kw_only=True)
class Row:
    """top1, top3: as `evaluate_reader` gives them. of_first: top1 as a share of the first row's; faster: speed too."""

    name: str
    precision: str
    top1: float
    top3: float
    of_first: float
    tokens_per_second: float
    faster: float


def readers(config: Readers, *, tell: Callable[[str], None] = lambda _: None) -> list[Row]:
    """The table, and output/report.json with it.

    tell: is called with a line before each step. Raises FileNotFoundError for data that is missing, and what the steps
    raise.
    """
    steps = Steps(config, tell)
    source = str(BUILT_IN if config.model is None else config.model)
    candidates = [("the reader", source, precision) for precision in ("fp32", "bf16", "int8")]
    candidates += [(reader.name, str(steps.small(reader)), "int8") for reader in config.readers]
    rows: list[Row] = []
    for name, model, precision in candidates:
        found = evaluate_reader(
            config.data,
            condition=config.condition,
            model=model,
            precision=precision,  # type: ignore[arg-type]
            limit=config.questions,
            systems=("reader",),
            seed=config.seed,
        )["rows"][0]
        first = rows[0] if rows else None
        top1, speed = found["top1"], found["tokens_per_second"]
        row = Row(
            name=name,
            precision=precision,
            top1=top1,
            top3=found["top3"],
            of_first=1.0 if first is None else top1 / first.top1 if first.top1 else 0.0,
            tokens_per_second=speed,
            faster=1.0 if first is None else speed / first.tokens_per_second,
        )
        tell(f"{name} [{precision}]: top-1 {row.top1:.3f}, {speed:,} tokens/s, {row.faster:.2f}x")
        rows.append(row)
    report = {"config": asdict(config) | {"data": None}, "rows": [asdict(row) for row in rows]}
    write_whole(Path(config.output) / "report.json", json.dumps(report, indent=2) + "\n")
    return rows


class Steps:
    """The recipe's data and models. Each step is done once; what is on disk is read."""

    def __init__(self, config: Readers, tell: Callable[[str], None]):
        self.config, self.folder, self.tell = config, Path(config.output), tell
        self.source = str(BUILT_IN if config.model is None else config.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)

    @cached_property
    def training(self) -> tuple[list[dict[str, Any]], Callable[[Any], float]]:
        """(rows as `collate` takes them, what calibrates a reader on held-out questions)."""
        config = self.config
        described = ReaderTraining(
            base=self.source,
            data=config.data,
            output=config.output,
            steps=config.steps,
            batch=config.batch,
            tokens_per_row=config.tokens_per_row,
            held_out=2 * config.calibrated,
            calibrated=config.calibrated,
            seed=config.seed,
        )
        articles = load_articles(config.data, cache_for(config.data), self.tokenizer)
        rows, held_out, allowed = split_rows(described, articles)
        packed = TrainingRows(articles, rows, allowed, self.tokenizer, described)
        made = [self._features(*packed[number]) for number in range(len(packed))]

        def calibrated(model: Any) -> float:
            last = held_out[-config.calibrated :]
            read = read_held_out(model, articles, self.tokenizer, last, fillers=allowed)
            return calibrate(model, read)

        return made, calibrated

    def small(self, reader: SmallReader) -> Path:
        """The folder of a reader that was pruned and has learnt again from the whole one."""
        folder = self.folder / reader.name.replace(" ", "-")
        if (folder / "reader").exists():
            return folder / "reader"
        self.tell(f"small reader: {reader.name}")
        rows, calibrated = self.training
        teacher = LongspanForEvidence.from_pretrained(self.source).eval()
        chosen = rows[-CALIBRATION_ROWS:]  # the last are whole stretches of text, as it will be asked to read
        batches = [self.collate(chosen[first : first + 4]) for first in range(0, len(chosen), 4)]
        small = prune(teacher, batches, Pruning(heads=reader.heads, ffn=reader.units, layers="global"))
        settings = Distillation(
            loss=DistillationLoss(logits=1.0, hard_labels=0.2, hidden_states=HIDDEN_STATES),
            steps=self.config.steps,
            batch=self.config.batch,
            learning_rate=self.config.learning_rate,
            save_steps=50,
            keep="nothing",
            seed=self.config.seed,
        )
        small = distill(teacher, small, Rows(rows, self.collate), folder, settings)
        calibrated(small)
        with whole_or_absent(folder / "reader") as made:
            small.save_pretrained(made)
            self.tokenizer.save_pretrained(made)
        return folder / "reader"

    @staticmethod
    def _features(question: Any, row: PackedRow, offset: int) -> dict[str, Any]:
        ids = [*question.tolist(), *row.document_ids.tolist()]
        spans = {name: value for name, value in row._asdict().items() if name != "document_ids"}
        return {"input_ids": ids, "question_length": len(question), "position_offset": offset, **spans}

    def collate(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch as `LongspanForEvidence` takes it."""
        rows = []
        for row in features:
            ids, length = np.array(row["input_ids"]), row["question_length"]
            spans = {name: row[name] for name in PackedRow._fields if name != "document_ids"}
            rows.append((ids[:length], PackedRow(document_ids=ids[length:], **spans)))
        batch = batch_rows(rows, self.tokenizer.pad_token_id)
        batch["position_offsets"] = np.array([row["position_offset"] for row in features])
        return {name: torch.from_numpy(array) for name, array in batch.items()}
