"""Classification tasks from files that people have: CSV, TSV (GLUE's too) and JSON lines, a text and a label a row."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.tasks.task import Example, Task, split_off

SUFFIXES = (".csv", ".tsv", ".tab", ".jsonl")
# Words of the second and third line of an Orange table.
ORANGE = {"", "d", "discrete", "c", "continuous", "s", "string", "class", "meta", "ignore"}

Cells = dict[str, Any]


class _Plain(csv.excel_tab):
    quoting = csv.QUOTE_NONE


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns hold what: names in the file's first row or JSON keys; numbers, from 0, for a file without names.

    text_pair: the second text of a pair (premise and hypothesis, question and passage); None where a row has one text.
    """

    text: str = "text"
    label: str = "label"
    text_pair: str | None = None

    @property
    def are_numbers(self) -> bool:
        return all(name is None or name.isdecimal() for name in (self.text, self.label, self.text_pair))

    def __post_init__(self):
        names = [name for name in (self.text, self.label, self.text_pair) if name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"text, label and text pair stand in columns of their own; got {', '.join(names)}")


def text_task(
    train: str | Path,
    *,
    dev: str | Path | None = None,
    test: str | Path | None = None,
    columns: Columns | None = None,
    dev_size: int | float = 0.1,
    seed: int = 0,
) -> Task:
    """A task from files with one row for each example; the labels are those of `train`, sorted.

    The suffix tells the format: .csv, .tsv or .tab (quotes mean nothing, as in GLUE) or .jsonl (or .json with a row a
    line). dev None: a seeded part of the training rows, as many as dev_size says or that share of them; rows with the
    same text stay together. A test file may lack the label column: its labels are secret then.
    Raises FileNotFoundError for a file that is not there; ValueError that names the file for a column that it lacks
    (with those it has), a row that is cut short, an empty file, and a class in dev or test that training never saw.
    """
    columns = columns or Columns()
    files = {"train": train, "dev": dev, "test": test}
    paths = {split: Path(path) for split, path in files.items() if path is not None}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
    rows = {split: list(_rows(path, columns, may_lack_label=split == "test")) for split, path in paths.items()}
    for split, found in rows.items():
        if not found:
            raise ValueError(f"{paths[split]} holds no rows, and {split} needs some")
    known = {label for *_, label in rows["train"] if label is not None}
    labels = tuple(sorted(known, key=lambda label: (0, int(label), "") if _is_integer(label) else (1, 0, label)))
    if len(labels) < 2:
        raise ValueError(f"{train} holds one class only ({', '.join(labels)}): there is nothing to tell apart")
    for split in paths:
        unseen = sorted({label for *_, label in rows[split] if label is not None} - known)
        if unseen:
            raise ValueError(
                f"{paths[split]} holds {_some(unseen)}, which no row of {train} has: a model cannot learn to name them"
            )
    numbers = {label: number for number, label in enumerate(labels)}
    splits = {
        split: tuple(
            Example(id=f"{split}-{line}", texts=texts, label=None if label is None else numbers[label])
            for line, texts, label in found
        )
        for split, found in rows.items()
    }
    if dev is None:
        splits["train"], splits["dev"] = hold_out(splits["train"], dev_size, seed)
    return Task(name=Path(train).stem, labels=labels, splits=splits)


def hold_out(
    examples: tuple[Example, ...], size: int | float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """`split_off` that puts no text in both parts: what is held out and stands in the rest as well leaves the rest."""
    rest, held_out = split_off(examples, size, seed)
    unseen = {text_key(example.texts) for example in held_out}
    rest = tuple(example for example in rest if text_key(example.texts) not in unseen)
    if not rest:
        raise ValueError("every text that would train is held out, too: name a file for dev")
    return rest, held_out


def text_key(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The same for texts that differ in case and spacing alone."""
    return tuple(" ".join(text.split()).casefold() for text in texts)


def _rows(path: Path, columns: Columns, *, may_lack_label: bool) -> Iterator[tuple[int, tuple[str, ...], str | None]]:
    """(line, texts, label) of every row."""
    suffix = path.suffix.lower()
    if suffix not in (*SUFFIXES, ".json"):
        raise ValueError(f"{path} ends in {suffix or 'nothing'}; rows are read from {', '.join(SUFFIXES)}")
    read = _json_lines if suffix in (".jsonl", ".json") else _table
    wanted = [columns.text, columns.label, *([] if columns.text_pair is None else [columns.text_pair])]
    for line, cells in read(path, columns):
        for name in wanted:
            if name not in cells and not (name == columns.label and may_lack_label):
                raise ValueError(
                    f"{path} has no column {name!r} (line {line}); it has {', '.join(map(repr, cells)) or 'none'}"
                )
        texts = tuple(cells[name] for name in wanted if name != columns.label)
        label = cells.get(columns.label)
        if label is None and not may_lack_label:
            raise ValueError(f"{path}, line {line} has no label")
        yield line, texts, None if label is None else label if isinstance(label, str) else json.dumps(label)


def _json_lines(path: Path, columns: Columns) -> Iterator[tuple[int, Cells]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}; each row is one line") from error
            if not isinstance(cells, dict):
                raise ValueError(f"{path}, line {number} is no JSON object; got {type(cells).__name__}")
            yield number, cells


def _table(path: Path, columns: Columns) -> Iterator[tuple[int, Cells]]:
    """Rows of a table; what Orange puts under its column names, two lines of types and roles, is passed over."""
    is_csv = path.suffix.lower() == ".csv"
    with path.open(encoding="utf-8-sig", newline="") as file, _long_cells():
        dialect = csv.excel if is_csv else _Plain
        reader = csv.reader(file, dialect, strict=is_csv)
        names: list[str] | None = None
        try:
            for cells in reader:
                if not cells:
                    continue
                if names is None:
                    names = [str(number) for number in range(len(cells))] if columns.are_numbers else cells
                    if not columns.are_numbers:
                        continue
                if reader.line_num in (2, 3) and path.suffix.lower() == ".tab" and set(cells) <= ORANGE:
                    continue
                if len(cells) != len(names):
                    raise ValueError(f"has {len(cells)} columns; the first line has {len(names)}")
                yield reader.line_num, dict(zip(names, cells, strict=True))
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module refuses cells of more than 131,072 characters, and documents may be longer."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _is_integer(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _some(labels: list[str]) -> str:
    shown = ", ".join(map(repr, labels[:5]))
    return f"the class{'es' if len(labels) > 1 else ''} {shown}{' and more' if len(labels) > 5 else ''}"
