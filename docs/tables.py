"""Writes the tables of README.md from the result files, so that no figure is typed: `python docs/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is the topic that ends the result file's name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- table: (?P<topic>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = {
    "system": "system",
    "top1": "top-1",
    "top3": "top-3",
    "late_top1": "late top-1",
    "late_top3": "late top-3",
    "token_f1": "token F1",
    "tokens_per_second": "tokens/s",
}


def render(topic: str) -> str:
    """The newest result of a topic as a Markdown table, with the command and the machine it was measured on."""
    path = max((ROOT / "results").glob(f"*_{topic}.json"))
    measured = json.loads(path.read_text())
    rows = measured["result"]["rows"]
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in COLUMNS) + " |" for row in rows]
    machine = measured["machine"]
    source = (
        f"`{measured['command']}`: {measured['result']['questions']} questions, {machine['cpu']}, "
        f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}, torch {machine['torch']} "
        f"([file]({path.relative_to(ROOT)}))."
    )
    return "\n".join([*lines, "", source, ""])


def with_tables(text: str) -> str:
    """The text with every marked table written anew."""
    return MARKED.sub(lambda found: found[1] + render(found["topic"]) + found[3], text)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}".lstrip("0")
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
