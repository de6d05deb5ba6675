"""Labelled texts, the rows of tokens that models read, and the figures that a task is judged by.

n examples, L labels, S spans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TOKENIZED_AT_ONCE = 1000  # examples; a row's offsets are held until its spans are found


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a task.

    texts: one or two. label: index into `Task.labels`; None where the data keep it secret.
    spans: character ranges, end exclusive, that the question is about (WiC, WSC). With one text all lie in it, with two
    the first lies in the first text and the second in the second.
    group: of rows that are judged together, such as the answers to one question. answer: what choosing this row out of
    its group answers.
    """

    id: str
    texts: tuple[str, ...]
    label: int | None = None
    spans: tuple[tuple[int, int], ...] = ()
    group: str | None = None
    answer: str | None = None

    def __post_init__(self):
        if len(self.texts) not in (1, 2):
            raise ValueError(f"example {self.id} has {len(self.texts)} texts; a row holds one or two")
        for text in self.texts:
            if not isinstance(text, str):
                raise ValueError(f"example {self.id}: a text is text; got {text!r}")
        for number, (start, end) in enumerate(self.spans):
            text = self.texts[number % len(self.texts)]
            if not 0 <= start < end <= len(text):
                raise ValueError(
                    f"example {self.id}: span {start}..{end} does not lie in its text of {len(text)} characters"
                )


def classification_scores(examples: Sequence[Example], logits: Array) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur."""
    from sklearn.metrics import accuracy_score, f1_score

    gold, found = [example.label for example in examples], logits.argmax(-1)
    return {"accuracy": float(accuracy_score(gold, found)), "macro_f1": float(f1_score(gold, found, average="macro"))}


@dataclass(frozen=True, kw_only=True)
class Task:
    """Examples by split ("train", "dev", "test"), the names of their labels, and how they are scored.

    metric: the figure that decides, a key of what `score` gives for examples with labels and their logits [n, L].
    """

    name: str
    labels: tuple[str, ...]
    splits: Mapping[str, tuple[Example, ...]]
    metric: str = "accuracy"
    score: Callable[[Sequence[Example], Array], dict[str, float]] = classification_scores

    def __post_init__(self):
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"{self.name} needs at least two labels, each named once; got {list(self.labels)}")
        for split, examples in self.splits.items():
            wrong = {example.label for example in examples} - {None, *range(len(self.labels))}
            if wrong:
                raise ValueError(f"{split} of {self.name} holds labels {wrong}; there are {len(self.labels)}")

    def examples(self, split: str) -> tuple[Example, ...]:
        """The examples of a split; ValueError where there is none, or it is empty."""
        if not self.splits.get(split):
            filled = [name for name, examples in self.splits.items() if examples]
            raise ValueError(
                f"{self.name} has no examples in its {split!r} split; it has some in {', '.join(filled) or 'none'}"
            )
        return self.splits[split]

    def metrics(self, split: str, logits: Array) -> dict[str, float]:
        """The task's figures for logits [n, L] of a whole split, in its order and in that of `labels`."""
        examples, logits = self.examples(split), np.asarray(logits, dtype=np.float64)
        if logits.shape != (len(examples), len(self.labels)):
            raise ValueError(
                f"{split} of {self.name} needs logits of shape {(len(examples), len(self.labels))}, a row for each "
                f"example and a column for each of {', '.join(self.labels)}; got {logits.shape}"
            )
        if not np.isfinite(logits).all():
            raise ValueError(f"the logits for {split} of {self.name} hold NaN or infinity, so they rank nothing")
        secret = sum(example.label is None for example in examples)
        if secret:
            raise ValueError(
                f"{secret} of the {len(examples)} examples in {split} of {self.name} have no label, so there is "
                f"nothing to compare with: write predictions instead"
            )
        return self.score(examples, logits)


def grouped(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples by group, in the order in which groups begin; one without a group is alone."""
    groups: dict[tuple[str, bool], list[Example]] = {}
    for example in examples:
        key = (example.id, False) if example.group is None else (example.group, True)
        groups.setdefault(key, []).append(example)
    return list(groups.values())


def label_columns(labels: Sequence[str], id2label: Mapping[int, str]) -> list[int]:
    """For each label of a task the column of a model's logits: `logits[:, columns]` stands in the task's order.

    A model whose labels carry no names (LABEL_0, ...) is taken to keep the task's order. It may know more labels than
    the task asks for. Raises ValueError that names those that it lacks.
    """
    known = [str(id2label[column]) for column in sorted(id2label)]
    if known == [f"LABEL_{column}" for column in range(len(known))] and len(known) == len(labels):
        return list(range(len(labels)))
    lacking = [label for label in labels if label not in known]
    if lacking:
        raise ValueError(
            f"the model has no label {', '.join(map(repr, lacking))}; it tells apart {', '.join(map(repr, known))}"
        )
    return [known.index(label) for label in labels]


def split_off(
    examples: Sequence[Example], size: int | float, seed: int = 0
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(the rest, a seeded sample): `size` examples, or that share of them where it is below 1; groups stay whole.

    Raises ValueError where nothing would be left of either part.
    """
    wanted = round(size * len(examples)) if size < 1 else int(size)
    if not 0 < wanted < len(examples):
        raise ValueError(f"cannot hold out {size} of {len(examples)} examples: one part would be empty")
    groups = grouped(examples)
    held_out: set[str] = set()
    for number in np.random.default_rng(seed).permutation(len(groups)):
        if len(held_out) >= wanted:
            break
        held_out |= {example.id for example in groups[number]}
    parts = [tuple(e for e in examples if (e.id in held_out) is kept) for kept in (False, True)]
    return parts[0], parts[1]


def tokenize(examples: Sequence[Example], tokenizer: Any, max_tokens: int | None = None) -> list[dict[str, Any]]:
    """Rows that models read: input_ids, attention_mask, token_type_ids where the tokenizer gives them, not padded.

    With `labels` where an example has one, and `span_ranges` [S, 2], token ranges with the end exclusive, where it has
    spans. A row longer than max_tokens loses the end of its longer text; None cuts nothing.
    Raises ValueError for a span that was cut off, and for spans with a tokenizer that pads on the left.
    """
    if not examples:
        return []
    has_spans = any(example.spans for example in examples)
    if has_spans and not (tokenizer.is_fast and tokenizer.padding_side == "right"):
        raise ValueError("spans need a fast tokenizer (one with a tokenizer.json) that pads on the right")
    if len({len(example.texts) for example in examples}) > 1:
        raise ValueError("examples with one text and examples with two cannot stand in the same rows")
    features: list[dict[str, Any]] = []
    for first in range(0, len(examples), TOKENIZED_AT_ONCE):
        part = examples[first : first + TOKENIZED_AT_ONCE]
        encoded = tokenizer(
            *map(list, zip(*(example.texts for example in part), strict=True)),
            truncation="longest_first" if max_tokens else False,
            max_length=max_tokens,
            verbose=False,  # about the tokenizer's own limit, which a long model does not have
        )
        for number, example in enumerate(part):
            row = {name: values[number] for name, values in encoded.items()}
            if example.label is not None:
                row["labels"] = example.label
            if has_spans:
                row["span_ranges"] = _token_ranges(example, encoded.encodings[number])
            features.append(row)
    return features


def _token_ranges(example: Example, encoding: Any) -> list[list[int]]:
    """The tokens that overlap each span."""
    ranges = []
    for number, (start, end) in enumerate(example.spans):
        text = number % len(example.texts)
        inside = [
            place
            for place, (of, (begin, stop)) in enumerate(zip(encoding.sequence_ids, encoding.offsets, strict=True))
            if of == text and begin < end and stop > start
        ]
        if not inside:
            raise ValueError(
                f"example {example.id}: the {len(encoding.ids)} tokens that are kept do not reach its span "
                f"{example.texts[text][start:end]!r}: allow more tokens"
            )
        ranges.append([inside[0], inside[-1] + 1])
    return ranges
