"""One benchmark from its cases to its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from longspan.bench import results
from longspan.bench.cases import reached
from longspan.bench.corpora import CorpusCase, measure_corpus
from longspan.bench.measure import Case, Row, measure, measure_memory
from longspan.bench.scaling import Layer, measure_layers

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


def run_scaling(
    command: str,
    *,
    layers: Sequence[Layer],
    cases: Sequence[Case],
    precisions: Sequence[str],
    seconds: float,
    quick: bool,
    max_tokens: int,
    memory_gib: float,
    earlier: dict[str, Any] | None = None,
    tell: Tell = lambda done, total, step: None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """The result of `longspan bench scaling`: layers at growing length, then some cases.

    earlier: the result of a run that was cut short, whose figures are not measured again. save: is given the result so
    far after each new figure. Raises ValueError where `earlier` comes from other code or another machine.
    """
    topic = "bench-scaling-quick" if quick else "bench-scaling"
    done = _rows_of(earlier, topic)
    total = len(layers) + len(cases)

    def document(rows: list[Row]) -> dict[str, Any]:
        return results.document(topic, command, [row.to_dict() for row in rows], reached(topic, rows))

    rows = measure_layers(
        layers,
        precisions=precisions,
        seconds=seconds,
        max_tokens=max_tokens,
        memory_gib=memory_gib,
        done=done,
        tell=partial(tell, 0, total),
        save=lambda rows: save(document(rows)),
    )
    for number, case in enumerate(cases, len(layers)):
        known = [row for row in done if row.case == case.name]
        rows += known or measure(case, seconds=seconds, rounds=1 if quick else 3, tell=partial(tell, number, total))
        save(document(rows))
    return document(rows)


def run_corpora(
    command: str, case: CorpusCase, *, rounds: int, quick: bool, tell: Tell = lambda done, total, step: None
) -> dict[str, Any]:
    """The result of `longspan bench corpus`."""
    topic = "bench-corpus-quick" if quick else "bench-corpus"
    rows = measure_corpus(case, rounds=rounds, tell=tell)
    return results.document(topic, command, [row.to_dict() for row in rows], reached(topic, rows))


def _rows_of(earlier: dict[str, Any] | None, topic: str) -> list[Row]:
    if earlier is None:
        return []
    here = {"topic": topic, "machine": results.machine(), "versions": results.versions(), "commit": results.commit()}
    for name, value in here.items():
        if earlier[name] != value:
            raise ValueError(
                f"the result to go on with has the {name} {earlier[name]}, now it is {value}; "
                f"measure it anew, without --resume"
            )
    return [Row(**row) for row in earlier["rows"] if row["status"] == "ok"]
