"""One or two rows of each SuperGLUE task in the benchmark's own fields, written to its own folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_PASSAGE = "By Ann Lee Ann Lee met Bob Ray in Rome.\n@highlight\nBob Ray lives in Oslo"

ROWS: dict[str, list[dict[str, Any]]] = {
    "BoolQ": [
        {"question": "is the zoo old", "passage": "Zoo -- The zoo is old.", "idx": 3, "label": True},
        {"question": "is the zoo red", "passage": "Zoo -- The zoo is old.", "idx": 4, "label": False},
    ],
    "CB": [{"premise": "They said it rained.", "hypothesis": "it rained", "label": "neutral", "idx": 7}],
    "COPA": [
        {
            "premise": "The glass broke.",
            "choice1": "It fell.",
            "choice2": "It was full.",
            "question": "cause",
            "label": 0,
            "idx": 5,
        },
        {
            "premise": "The sun rose.",
            "choice1": "It got dark.",
            "choice2": "It got warm.",
            "question": "effect",
            "label": 1,
            "idx": 6,
        },
    ],
    "MultiRC": [
        {
            "idx": 2,
            "version": 1.1,
            "passage": {
                "text": "Alice wrote the report near the river.",
                "questions": [
                    {
                        "question": "Who wrote?",
                        "idx": 8,
                        "answers": [
                            {"text": "Alice", "idx": 20, "label": 1},
                            {"text": "Bob", "idx": 21, "label": 0},
                        ],
                    },
                    {
                        "question": "Where?",
                        "idx": 9,
                        "answers": [
                            {"text": "Near the river", "idx": 22, "label": 1},
                            {"text": "In town", "idx": 23, "label": 0},
                        ],
                    },
                ],
            },
        }
    ],
    "ReCoRD": [
        {
            "source": "Daily mail",
            "idx": 11,
            "passage": {
                "text": _PASSAGE,
                "entities": [  # the end is the last character
                    {"start": 3, "end": 9},
                    {"start": 11, "end": 17},
                    {"start": 23, "end": 29},
                    {"start": 34, "end": 37},
                    {"start": 68, "end": 71},
                ],
            },
            "qas": [
                {
                    "query": "The meeting in Rome pleased @placeholder.",
                    "idx": 31,
                    "answers": [{"start": 3, "end": 9, "text": "Ann Lee"}, {"start": 11, "end": 17, "text": "Ann Lee"}],
                },
                {
                    "query": "@placeholder is where he lives.",
                    "idx": 32,
                    "answers": [{"start": 68, "end": 71, "text": "Oslo"}],
                },
            ],
        }
    ],
    "RTE": [{"premise": "No zoo was found.", "hypothesis": "A zoo was found.", "label": "not_entailment", "idx": 1}],
    "WiC": [
        {
            "word": "feel",
            "sentence1": "You make me feel old.",
            "sentence2": "She felt small.",
            "idx": 12,
            "label": True,
            "start1": 12,
            "start2": 4,
            "end1": 16,
            "end2": 8,
            "version": 1.1,
        }
    ],
    "WSC": [
        {
            "text": 'The old man saw Bob. "Good for him," he said to the old man.',
            "target": {"span1_index": 9, "span1_text": "The old man", "span2_index": 7, "span2_text": "him"},
            "idx": 14,
            "label": False,
        }
    ],
}


def write_superglue(folder: Path, *, without_labels: bool = False) -> Path:
    """The benchmark's folder with train.jsonl and val.jsonl of every task; test.jsonl as it is published if asked."""
    for name, rows in ROWS.items():
        (folder / name).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "train.jsonl").write_text(text)
        (folder / name / "val.jsonl").write_text(text)
        if without_labels:
            hidden = "".join(json.dumps(_without_labels(row)) + "\n" for row in rows)
            (folder / name / "test.jsonl").write_text(hidden)
    return folder


def _without_labels(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_labels(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    is_query = "query" in value
    return {
        key: _without_labels(entry)
        for key, entry in value.items()
        if key != "label" and not (is_query and key == "answers")
    }
