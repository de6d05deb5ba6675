"""The eight tasks of SuperGLUE from the benchmark's own folders, and predictions in the form that it takes.

All are rows for a classifier of sequences, or for one of spans (WiC, WSC). Source: arXiv 1905.00537.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longspan.tasks.superglue_metrics import (
    best_of_groups,
    cb_scores,
    choice_scores,
    multirc_scores,
    record_scores,
)
from longspan.tasks.task import Array, Example, Task, classification_scores, grouped

FILES = {"train": "train.jsonl", "dev": "val.jsonl", "test": "test.jsonl"}
TRUTH = ("false", "true")

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one task is written. read: a row of its file -> examples; predict: examples of a split and logits -> rows."""

    folder: str
    labels: tuple[str, ...]
    read: Callable[[Row], Iterator[Example]]
    predict: Callable[[tuple[Example, ...], tuple[str, ...], Array], Iterator[dict[str, Any]]]
    score: Callable[..., dict[str, float]] = classification_scores
    metric: str = "accuracy"


def superglue_task(name: str, data: str | Path) -> Task:
    """A task of SuperGLUE: "boolq", "cb", "copa", "multirc", "record", "rte", "wic" or "wsc".

    data: the benchmark's folder, or the task's own in it, with train.jsonl, val.jsonl (our split "dev") and test.jsonl,
    whose rows have no labels. Those there are become splits.
    Raises FileNotFoundError where there is none, ValueError that names file and line for a row that is not as it ought
    to be.
    """
    form = FORMATS.get(name.lower())
    if form is None:
        raise ValueError(f"SuperGLUE has no task {name!r}; it has {', '.join(FORMATS)}")
    folder = Path(data)
    if (folder / form.folder).is_dir():
        folder = folder / form.folder
    paths = {split: folder / file for split, file in FILES.items() if (folder / file).is_file()}
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds none of {', '.join(FILES.values())} and no folder {form.folder} that does: name the "
            f"folder where SuperGLUE was unpacked"
        )
    answers: dict[str, tuple[str, ...]] = {}
    splits = {split: tuple(_examples(form, path, answers)) for split, path in paths.items()}
    score = partial(record_scores, answers=answers) if form.score is record_scores else form.score
    return Task(name=name.lower(), labels=form.labels, splits=splits, metric=form.metric, score=score)


def predictions(task: Task, split: str, logits: Array) -> Iterator[dict[str, Any]]:
    """The rows of a prediction file, as the benchmark's server takes them, for logits [n, L] of a split of a task."""
    if task.name not in FORMATS:
        raise ValueError(f"{task.name} is no task of SuperGLUE; those are {', '.join(FORMATS)}")
    examples = task.examples(split)
    if logits.shape != (len(examples), len(task.labels)):
        raise ValueError(f"expected logits of shape {(len(examples), len(task.labels))}; got {logits.shape}")
    return FORMATS[task.name].predict(examples, task.labels, logits)


def write_predictions(task: Task, split: str, logits: Array, folder: str | Path) -> Path:
    """Writes `predictions` to the file in `folder` that the server looks for, such as BoolQ.jsonl; its path."""
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in predictions(task, split, logits)]
    path = Path(folder) / f"{FORMATS[task.name].folder}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(f".{path.name}.partial")
    partial_file.write_text("".join(rows), encoding="utf-8")
    partial_file.replace(path)
    return path


def _examples(form: Format, path: Path, answers: dict[str, tuple[str, ...]]) -> Iterator[Example]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield from form.read(row)
                if form.score is record_scores:
                    answers.update(_gold_answers(row))
            except KeyError as error:
                raise ValueError(
                    f"{path}, line {number} has no {error.args[0]!r}; a row of {form.folder} must hold it"
                ) from error
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number} is no row of {form.folder}: {error}") from error


def _label(row: Row, labels: tuple[str, ...]) -> int | None:
    """A label as the files write it (text, truth value or number) -> its index; None where the row has none."""
    found = row.get("label")
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int):
        found = str(found).lower()
        if found not in labels:
            raise ValueError(f"label {found!r} is none of {', '.join(labels)}")
        return labels.index(found)
    if not 0 <= found < len(labels):
        raise ValueError(f"label {found} is none of 0 to {len(labels) - 1}")
    return found


def _boolq(row: Row) -> Iterator[Example]:
    """The question comes first: what is cut is the end of the passage."""
    yield Example(id=str(row["idx"]), texts=(row["question"], row["passage"]), label=_label(row, TRUTH))


def _entailment(labels: tuple[str, ...], row: Row) -> Iterator[Example]:
    yield Example(id=str(row["idx"]), texts=(row["premise"], row["hypothesis"]), label=_label(row, labels))


def _copa(row: Row) -> Iterator[Example]:
    """Two rows, one a choice, of which the likelier wins.

    So the order of the choices cannot matter, a question teaches by two rows, and a sequence classifier reads them:
    what distils, prunes, packs or exports one needs no case for multiple choice.
    """
    links = {"cause": "because", "effect": "so"}
    if row["question"] not in links:
        raise ValueError(f"question {row['question']!r} is neither 'cause' nor 'effect'")
    right = _label(row, ("0", "1"))
    premise = f"{row['premise'].strip().rstrip('.')} {links[row['question']]}"
    for number in (0, 1):
        yield Example(
            id=f"{row['idx']}/{number}",
            texts=(premise, row[f"choice{number + 1}"]),
            label=None if right is None else int(number == right),
            group=str(row["idx"]),
            answer=str(number),
        )


def _multirc(row: Row) -> Iterator[Example]:
    """A row for each answer: question and answer, then the passage, whose end is what is cut."""
    passage = row["passage"]
    for question in passage["questions"]:
        group = f"{row['idx']}/{question['idx']}"
        for answer in question["answers"]:
            yield Example(
                id=f"{group}/{answer['idx']}",
                texts=(f"{question['question']} {answer['text']}", passage["text"]),
                label=_label(answer, TRUTH),
                group=group,
                answer=answer["text"],
            )


def _record(row: Row) -> Iterator[Example]:
    """A row for each different entity of the passage: the query with the entity in its gap, then the passage."""
    passage = row["passage"]["text"]
    entities = [passage[entity["start"] : entity["end"] + 1] for entity in row["passage"]["entities"]]
    shown = passage.replace("\n@highlight\n", "\n")
    for query in row["qas"]:
        group = f"{row['idx']}/{query['idx']}"
        golds = {answer["text"] for answer in query["answers"]} if "answers" in query else None
        for number, entity in enumerate(dict.fromkeys(entities)):
            yield Example(
                id=f"{group}/{number}",
                texts=(query["query"].replace("@placeholder", entity), shown),
                label=None if golds is None else int(entity in golds),
                group=group,
                answer=entity,
            )


def _gold_answers(row: Row) -> Iterator[tuple[str, tuple[str, ...]]]:
    for query in row["qas"]:
        golds = tuple(dict.fromkeys(answer["text"] for answer in query.get("answers", ())))
        if golds:
            yield f"{row['idx']}/{query['idx']}", golds


def _wic(row: Row) -> Iterator[Example]:
    yield Example(
        id=str(row["idx"]),
        texts=(row["sentence1"], row["sentence2"]),
        label=_label(row, TRUTH),
        spans=((int(row["start1"]), int(row["end1"])), (int(row["start2"]), int(row["end2"]))),
    )


def _wsc(row: Row) -> Iterator[Example]:
    text, target = row["text"], row["target"]
    spans = tuple(_find_words(text, target[f"span{n}_text"], int(target[f"span{n}_index"])) for n in (1, 2))
    yield Example(id=str(row["idx"]), texts=(text,), label=_label(row, TRUTH), spans=spans)


def _find_words(text: str, wanted: str, word: int) -> tuple[int, int]:
    """Characters of `wanted` in a text: the place nearest to the start of the word with that number, counted from 0.

    The files are not exact: letters' case differs, punctuation clings to words, some numbers are off by one.
    """
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    expected = starts[min(word, len(starts) - 1)] if starts else 0
    found = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, re.IGNORECASE)]
    if not wanted or not found:
        raise ValueError(f"span {wanted!r} does not occur in {text!r}")
    start = min(found, key=lambda place: abs(place - expected))
    return start, start + len(wanted)


def _by_name(examples: tuple[Example, ...], labels: tuple[str, ...], logits: Array) -> Iterator[dict[str, Any]]:
    for example, best in zip(examples, logits.argmax(-1), strict=True):
        yield {"idx": int(example.id), "label": labels[best]}


def _capitalized(examples: tuple[Example, ...], labels: tuple[str, ...], logits: Array) -> Iterator[dict[str, Any]]:
    return _by_name(examples, tuple(label.capitalize() for label in labels), logits)


def _choices(examples: tuple[Example, ...], labels: tuple[str, ...], logits: Array) -> Iterator[dict[str, Any]]:
    for chosen in best_of_groups(examples, logits):
        yield {"idx": int(str(chosen.group)), "label": int(str(chosen.answer))}


def _answers(examples: tuple[Example, ...], labels: tuple[str, ...], logits: Array) -> Iterator[dict[str, Any]]:
    best = {example.id: int(label) for example, label in zip(examples, logits.argmax(-1), strict=True)}
    passages: dict[int, list[dict[str, Any]]] = {}
    for group in grouped(examples):
        passage, question = map(int, str(group[0].group).split("/"))
        answers = [{"idx": int(example.id.split("/")[2]), "label": best[example.id]} for example in group]
        passages.setdefault(passage, []).append({"idx": question, "answers": answers})
    for passage, questions in passages.items():
        yield {"idx": passage, "passage": {"questions": questions}}


def _entities(examples: tuple[Example, ...], labels: tuple[str, ...], logits: Array) -> Iterator[dict[str, Any]]:
    for chosen in best_of_groups(examples, logits):
        yield {"idx": int(str(chosen.group).split("/")[1]), "label": chosen.answer}


_CB = ("entailment", "contradiction", "neutral")
_RTE = ("entailment", "not_entailment")

FORMATS = {
    "boolq": Format(folder="BoolQ", labels=TRUTH, read=_boolq, predict=_by_name),
    "cb": Format(
        folder="CB",
        labels=_CB,
        read=partial(_entailment, _CB),
        predict=_by_name,
        score=cb_scores,
        metric="average",
    ),
    "copa": Format(folder="COPA", labels=("wrong", "right"), read=_copa, predict=_choices, score=choice_scores),
    "multirc": Format(
        folder="MultiRC",
        labels=TRUTH,
        read=_multirc,
        predict=_answers,
        score=multirc_scores,
        metric="average",
    ),
    "record": Format(
        folder="ReCoRD",
        labels=("wrong", "right"),
        read=_record,
        predict=_entities,
        score=record_scores,
        metric="average",
    ),
    "rte": Format(folder="RTE", labels=_RTE, read=partial(_entailment, _RTE), predict=_by_name),
    "wic": Format(folder="WiC", labels=TRUTH, read=_wic, predict=_by_name),
    "wsc": Format(folder="WSC", labels=TRUTH, read=_wsc, predict=_capitalized),
}
