"""A data folder in the formats of the real one: a dozen articles whose evidence is the one sentence with a zebra."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np

PLAIN = "the red town was near the old river . alice wrote a report in the green zoo . bob lives in blue ."
NOUNS = ("alice", "bob", "report", "town", "river", "zoo", "old", "wrote")


def article(number: int, sentences: int, zebra: int) -> list[str]:
    """Sentences of a dozen words each, no two alike; sentence `zebra` has the zebra."""
    rng = np.random.default_rng(number)
    lines = [" ".join([*rng.permutation(NOUNS), "in", "the", f"n{number}x{i}", "."]) for i in range(sentences)]
    lines[zebra] = f"the zebra of {NOUNS[number % 8]} lives in the red zoo ."
    return [f"TITLE{number}", *lines]


def write_small_data(folder: Path, *, sentences: int = 60) -> Path:
    """16 training rows on 8 articles, 3 evaluation rows, 2 unused articles, a copy of an evaluation article."""
    articles = {f"a{n}": article(n, sentences, zebra=5 + 7 * (n % 8) % (sentences - 8)) for n in range(13)}
    articles["copy"] = ["COPY", *articles["a8"][1:]]
    rows = {"train": [(f"t{n}", f"a{n % 8}") for n in range(16)], "dev": [(f"d{n}", f"a{8 + n}") for n in range(3)]}
    rows["train"].append(("leak", "copy"))
    _write(folder / "boolq_articles", articles, rows, "where lives the zebra", xz=("docs",))
    pages = {f"p{n}": article(100 + n, 6, zebra=2) for n in range(4)}
    splits = {"val": [("v0", "p0"), ("v1", "p1")], "test": [("s0", "p2"), ("s1", "p3")]}
    _write(folder / "fever", pages, splits, "the zebra lives -LRB- in the zoo -RRB- .", xz=("docs", "val", "test"))
    _write(folder / "multirc", pages, splits, "who lives in the zoo ? || the zebra", xz=("docs", "val", "test"))
    context = f"{PLAIN} Bob lives. The zebra lives in the red zoo near the river, alice wrote. {PLAIN}"
    answer = {"text": "red zoo", "answer_start": context.index("red zoo")}
    question = {"id": "x", "question": "Where?", "answers": [answer]}
    paragraphs = [{"context": "alice wrote.", "qas": []}, {"context": context, "qas": [question]}]
    (folder / "xquad").mkdir(parents=True)
    document = {"data": [{"title": "Zoo", "paragraphs": paragraphs}]}
    (folder / "xquad" / "xquad.en.json").write_text(json.dumps(document))
    return folder


def _write(folder: Path, articles: dict[str, list[str]], splits: dict, question: str, *, xz: tuple[str, ...]) -> None:
    folder.mkdir(parents=True)
    files = {"docs": [{"id": name, "text": "\n".join(lines)} for name, lines in articles.items()]}
    for split, rows in splits.items():
        files[split] = [_row(name, articles[where], where, question) for name, where in rows]
    for name, records in files.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        if name in xz:
            (folder / f"{name}.jsonl.xz").write_bytes(lzma.compress(text.encode()))
        else:
            (folder / f"{name}.jsonl").write_text(text)


def _row(name: str, lines: list[str], docid: str, question: str) -> dict:
    lengths = [len(line.split()) for line in lines]
    sentence = next(i for i, line in enumerate(lines) if "zebra" in line)
    start = sum(lengths[:sentence])
    span = {"docid": docid, "start_token": start, "end_token": start + lengths[sentence]}
    return {"id": name, "query": question, "label": "True", "docids": [docid], "evidences": [[span]]}
