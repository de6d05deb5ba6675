"""One benchmark from its cases to its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from longspan.bench import results
from longspan.bench.cases import reached
from longspan.bench.measure import Case, Row, measure, measure_memory

Tell = Callable[[int, int, str], None]  # cases done, cases in all, what happens now


def run(
    topic: str,
    command: str,
    cases: Sequence[Case],
    *,
    seconds: float,
    quick: bool,
    memory: bool = False,
    memory_cases: Sequence[Case] = (),
    tell: Tell = lambda done, total, step: None,
) -> dict[str, Any]:
    """The result of a benchmark, as its file holds it.

    seconds: how long the systems of one case take turns, after three rounds (quick: one) that are always made.
    memory: also measure the memory of every system of every case. memory_cases: of these, nothing else is measured.
    """
    total = len(cases) + len(memory_cases)
    rows: list[Row] = []
    for number, case in enumerate([*cases, *memory_cases]):
        step = partial(tell, number, total)
        if number < len(cases):
            rows += measure(case, seconds=seconds, rounds=1 if quick else 3, memory=memory, tell=step)
        else:
            rows += measure_memory(case, tell=step)
    if quick:
        topic = f"{topic}-quick"  # which no page quotes
    return results.document(topic, command, [row.to_dict() for row in rows], reached(topic, rows))
