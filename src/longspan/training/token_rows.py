"""The batches of a run over token files. The seed and i alone decide batch i, so a run can stop and go on anywhere.

R rows, L tokens each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling

from longspan.training.curriculum import Curriculum

Array = NDArray[Any]
Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a model learns from rows of ids.

    make: ids [R, L - added] and a seed -> what the model's forward takes. added: special tokens that it adds to a row.
    counted: what a loss is a mean over, in words.
    """

    make: Callable[[Tensor, int], Batch]
    added: int = 0
    counted: str = "token"


def next_token() -> Objective:
    """Every token is said from those before it; the first of a row is not."""

    def make(ids: Tensor, seed: int) -> Batch:
        labels = ids.clone()
        labels[:, 0] = -100  # which models leave out anyway, but the Trainer counts labels to take the mean
        return {"input_ids": ids, "labels": labels}

    return Objective(make=make)


def hidden_tokens(tokenizer: Any, share: float = 0.15) -> Objective:
    """Masked language modeling: `share` of the tokens is hidden (four fifths of these masked, a tenth other tokens, a
    tenth as they are) and said from all others. Rows stand between the tokenizer's first and last special token."""
    if not 0 < share < 1:
        raise ValueError(f"the share of hidden tokens must lie between 0 and 1; got {share}")
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    if tokenizer.mask_token_id is None or first is None or last is None:
        raise ValueError(
            f"masked language modeling needs a tokenizer with a mask token and tokens that open and close a row; "
            f"{type(tokenizer).__name__} has {', '.join(tokenizer.special_tokens_map) or 'none'}"
        )

    def make(ids: Tensor, seed: int) -> Batch:
        # A collator that draws one batch after another would draw others in a run that goes on, and one with `seed`
        # makes its generator only in a process that no other started.
        collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=share)
        collate.generator = torch.Generator().manual_seed(seed)
        rows = torch.nn.functional.pad(ids, (1, 1))
        rows[:, 0], rows[:, -1] = first, last
        special = torch.zeros_like(rows)
        special[:, 0] = special[:, -1] = 1
        batch = collate(
            [{"input_ids": row, "special_tokens_mask": mask} for row, mask in zip(rows, special, strict=True)]
        )
        return {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(rows), "labels": batch["labels"]}

    return Objective(make=make, added=2, counted="hidden token")


class TrainingRows(Dataset):
    """All batches of a run, `parts` of them a step. Item: what the model's forward takes.

    shards: items that a batch is cut into along its rows, one after the other: those of the processes that compute it.
    In a phase every stretch of `length` tokens comes once before any comes again; passes begin at different tokens, so
    that rows are cut elsewhere. ValueError for a text that is shorter than a row, or steps that parts do not divide.
    """

    def __init__(
        self, tokens: Array, curriculum: Curriculum, objective: Objective, *, parts: int, seed: int, shards: int = 1
    ):
        for number, phase in enumerate(curriculum.phases):
            if phase.batch % parts:
                raise ValueError(
                    f"phase {number + 1} has {phase.batch} rows a step, which {parts} batches (those accumulated, "
                    f"times processes with rows of their own) do not divide"
                )
            if len(tokens) < phase.length:
                raise ValueError(
                    f"the training split has {len(tokens):,} tokens and phase {number + 1} reads rows of "
                    f"{phase.length:,}: give more text, or shorter rows"
                )
        self.tokens, self.curriculum, self.objective = tokens, curriculum, objective
        self.parts, self.seed, self.shards = parts, seed, shards
        self._pass: tuple[Any, Array] | None = None

    def __len__(self) -> int:
        return self.curriculum.steps * self.parts * self.shards

    def __getitem__(self, index: int) -> Batch:
        index, shard = divmod(int(index), self.shards)
        step, part = divmod(index, self.parts)
        number, phase, step = self.curriculum.at(step)
        rows = phase.batch // self.parts
        first = step * phase.batch + part * rows
        starts = [self._start(number, phase.length - self.objective.added, row) for row in range(first, first + rows)]
        length = phase.length - self.objective.added
        ids = np.stack([self.tokens[start : start + length] for start in starts]).astype(np.int64)
        return _cut(self.objective.make(torch.from_numpy(ids), self.seed * 1_000_003 + index), self.shards)[shard]

    def _start(self, phase: int, length: int, row: int) -> int:
        """Where row number `row` of a phase begins."""
        rows = max(1, (len(self.tokens) - length + 1) // length)
        passed, place = divmod(row, rows)
        key = (phase, passed)
        if self._pass is None or self._pass[0] != key:
            rng = np.random.default_rng((self.seed, *key))
            shift = int(rng.integers(len(self.tokens) - rows * length + 1))
            self._pass = key, shift + length * rng.permutation(rows)
        return int(self._pass[1][place])


def dev_batches(
    tokens: Array, length: int, rows: int, most: int, objective: Objective, *, shards: int = 1
) -> list[Batch]:
    """The beginning of a split in rows of `length`, about `most` tokens of it, as batches of `rows` rows, each of them
    in as many items as `TrainingRows` makes of one."""
    inside = length - objective.added
    count = min(len(tokens), max(most, length)) // inside
    if not count:
        raise ValueError(f"the dev split has {len(tokens):,} tokens, less than one row of {length:,}: give more text")
    rows = min(rows, count)
    count -= count % rows
    ids = torch.from_numpy(np.asarray(tokens[: count * inside], np.int64).reshape(-1, rows, inside))
    return [cut for number, part in enumerate(ids) for cut in _cut(objective.make(part, number), shards)]


def _cut(batch: Batch, shards: int) -> list[Batch]:
    """A batch in parts along its rows, as equal as they can be."""
    cut = {name: rows.tensor_split(shards, 1) for name, rows in batch.items()}
    return [{name: parts[shard] for name, parts in cut.items()} for shard in range(shards)]
