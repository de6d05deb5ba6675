"""Writes the tables of README.md and docs/ from the result files, so that no figure is typed: `python docs/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is the topic that ends the result file's name, or
`goals`: what the benchmarks should reach, and what they do.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "recipes.md")
MARKED = re.compile(r"(<!-- table: (?P<topic>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = {
    "reader": {
        "system": "system",
        "top1": "top-1",
        "top3": "top-3",
        "late_top1": "late top-1",
        "late_top3": "late top-3",
        "token_f1": "token F1",
        "tokens_per_second": "tokens/s",
    },
    "recipe-reader": {
        "name": "reader",
        "precision": "precision",
        "top1": "top-1",
        "top3": "top-3",
        "of_first": "share of the first row's",
        "tokens_per_second": "tokens/s",
        "faster": "times as fast",
    },
    "recipe-reviews": {
        "name": "reviews one at a time",
        "engine": "engine",
        "ms_per_review": "ms a review",
        "speedup": "times as fast",
        "accuracy": "accuracy",
        "of_teacher": "share of the teacher's",
    },
}
Row = dict[str, Any]


def with_tables(text: str, page: Path = PAGES[0]) -> str:
    """The text of a page with every marked table written anew."""
    return MARKED.sub(lambda found: found[1] + render(found["topic"], page) + found[3], text)


def render(topic: str, page: Path) -> str:
    """The newest result of a topic on each machine as Markdown, with the command and the machine."""
    if topic == "goals":
        return render_goals()
    paths = newest(topic)
    if not paths:
        return f"Not measured yet: `longspan {topic.replace('-', ' ', 1)}`.\n"
    return "\n".join(render_file(topic, path, page) for path in paths)


def render_file(topic: str, path: Path, page: Path) -> str:
    measured = json.loads(path.read_text())
    link = f"[file]({os.path.relpath(path, page.parent)})"
    if topic.startswith("bench-"):
        return render_benchmark(measured, link)
    machine = measured["machine"]
    result = measured["result"]
    source = (
        f"`{measured['command']}`: {_count(result)}, {machine['cpu']}, {_threads(machine)}, torch {machine['torch']} "
        f"({link}). {measured.get('note', '')}"
    ).rstrip()
    if topic == "recipe-characters":
        return "\n".join([*_character_tables(result), source, ""])
    columns = COLUMNS[topic if topic in COLUMNS else topic.split("-")[0]]
    rows = [[_cell(row[name]) for name in columns] for row in result["rows"]]
    return f"{_table(list(columns.values()), rows)}\n{source}\n"


def _count(result: dict[str, Any]) -> str:
    """Of what was measured on."""
    if "evaluated" in result:
        scored, stretches = result["evaluated"]["scored"], result["evaluated"]["stretches"]
        return f"{stretches} stretches of {scored} characters"
    if "questions" in result:
        return f"{result['questions']} questions"
    config = result["config"]
    return f"{config['test_rows']} reviews" if "test_rows" in config else f"{config['questions']} questions"


def _character_tables(result: dict[str, Any]) -> list[str]:
    """The systems, the ablations and the compressors beside them."""
    systems = [row for row in result["rows"] if not row["ablation"]]
    ablations = [row for row in result["rows"] if row["ablation"]]
    lengths = [str(length) for length in result["config"]["lengths"]]
    head = ["bits per character at", *(f"{int(length):,}" for length in lengths), "first less last, standard error"]
    lines = [
        [
            row["name"],
            *(_bits(row["bits"][length]) for length in lengths),
            f"{row['gain']:.3f} ± {row['gain_error']:.3f}",
        ]
        for row in systems
    ]
    costs = [
        [
            row["name"],
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['tokens'] / 1e6:.1f} M of {row['length']:,}",
            f"{row['operations'] / 1e15:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['minutes']:.0f}",
            f"{row['peak_memory_gib']:.1f}",
        ]
        for row in systems
    ]
    measured = [
        [
            row["name"],
            f"{row['tokens'] / 1e6:.1f} M",
            *(_bits(bits) for bits in row["bits"].values() if bits is not None),
        ]
        for row in ablations
    ]
    references = [[row["name"], _bits(row["bits"])] for row in result["references"]]
    cost_head = ["training", "parameters", "tokens, longest rows", "Pflop", "tokens/s", "minutes", "GiB"]
    tables = [_table(head, lines), _table(cost_head, costs)]
    if ablations:
        length = next(length for length, bits in ablations[0]["bits"].items() if bits is not None)
        tables.append(_table(["ablation", "tokens", f"bits per character at {int(length):,}"], measured))
    return [*tables, _table(["compressor, whole test text", "bits per character"], references)]


def _bits(bits: float | None) -> str:
    return "-" if bits is None else f"{bits:.3f}"


def newest(topic: str) -> list[Path]:
    """One file for each machine. File names are date_machine_topic."""
    by_machine = {path.name.split("_")[1]: path for path in sorted((ROOT / "results").glob(f"*_{topic}.json"))}
    return [by_machine[machine] for machine in sorted(by_machine)]


def render_benchmark(measured: dict[str, Any], link: str) -> str:
    """A table for each set of systems that met: systems downwards, cases across, medians in ms or memory in MiB."""
    groups: dict[frozenset[str], dict[str, list[Row]]] = {}
    layers = [row for row in measured["rows"] if "layer" in row.get("shape", ())]
    others = [row for row in measured["rows"] if row not in layers]
    for case in dict.fromkeys(row["case"] for row in others):
        rows = [row for row in others if row["case"] == case]
        groups.setdefault(frozenset(row["system"] for row in rows), {})[case] = rows
    tables = [*_layer_tables(layers), *(_benchmark_table(cases) for cases in groups.values())]
    machine, versions = measured["machine"], measured["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version and name != "longspan")
    source = (
        f"`{measured['command']}`: {machine['cpu']}, {_threads(machine)}, kernels for {machine['instruction_set']}, "
        f"commit {measured['commit']}, {measured['date']}; {packages} ({link})."
    )
    return "\n".join([*tables, source, ""])


def _layer_tables(rows: list[Row]) -> list[str]:
    """A table for each layer: lengths downwards, directions and precisions across, time and memory per token."""
    tables = []
    for layer in dict.fromkeys(row["shape"]["layer"] for row in rows):
        cells: dict[int, dict[tuple[bool, str], str]] = {}
        for row in rows:
            shape = row["shape"]
            if shape["layer"] == layer and row["ours"]:
                cells.setdefault(shape["tokens"], {})[shape["backward"], row["precision"]] = _layer_cell(row)
        columns = sorted({column for line in cells.values() for column in line}, key=lambda key: (key[0], key[1] < "c"))
        names = [f"forward{' and backward' * backward}, {precision}" for backward, precision in columns]
        head = [f"{layer} layer, tokens", *(f"{name}: µs/token (over dense SDPA), KiB/token" for name in names)]
        lines = [[f"{tokens:,}", *(line.get(column, "") for column in columns)] for tokens, line in cells.items()]
        tables.append(_table(head, lines))
    return tables


def _layer_cell(row: Row) -> str:
    if row["status"] != "ok":
        return row["status"]
    tokens, peak = row["shape"]["tokens"], row["peak_mib"]
    over = "".join(f" ({ratio:.2f}x)" for ratio in row["speedup"].values())
    memory = "" if peak is None or tokens < 4096 else f", {float(format(1024 * peak / tokens, '.3g')):g}"
    return f"{float(format(1e3 * row['median_ms'] / tokens, '.3g')):g}{over}{memory}"


def _benchmark_table(cases: dict[str, list[Row]]) -> str:
    several = any(len({row["system"] for row in rows}) < len(rows) for rows in cases.values())
    labels = list(dict.fromkeys(_label(row, several) for rows in cases.values() for row in rows))
    memory = all(row["median_ms"] is None and row["tolerance"] is None for rows in cases.values() for row in rows)
    others = {len(row["speedup"]) for rows in cases.values() for row in rows if row["ours"]} - {0}
    over = (
        "" if memory or not others else " (speed-up over each other)" if max(others) <= 2 else " (over the best other)"
    )
    head = ["MiB" if memory else f"ms{over}", *cases, *([] if memory else ["largest error, tolerance"])]
    body = []
    for label in labels:
        found = {
            case: next((row for row in rows if _label(row, several) == label), None) for case, rows in cases.items()
        }
        body.append([label, *(_benchmark_cell(row) for row in found.values())])
        if not memory:
            body[-1].append(_error_cell([row for row in found.values() if row is not None]))
    return _table(head, body)


def _label(row: Row, several_precisions: bool) -> str:
    return f"{row['system']} {row['precision']}" if several_precisions else row["system"]


def _benchmark_cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"]
    if row["median_ms"] is None:
        return f"{row['peak_mib']:,.0f}" if row["peak_mib"] is not None else "-"
    ratios = list(row["speedup"].values())
    notes = [f"{ratio:.2f}x" for ratio in (ratios if len(ratios) <= 2 else [min(ratios)])]
    if row["share_of_gemm"] is not None:
        notes.append(f"{row['share_of_gemm']:.0%} of GEMM")
    milliseconds = f"{float(format(row['median_ms'], '.3g')):,g}"
    return f"{milliseconds} ({', '.join(notes)})" if notes else milliseconds


def _error_cell(rows: list[Row]) -> str:
    measured = [row for row in rows if row["relative_error"] is not None and row["tolerance"] is not None]
    if not measured:
        return ""
    worst = max(measured, key=lambda row: row["relative_error"] / row["tolerance"])
    return f"{worst['relative_error']:.1e}, {worst['tolerance']:.0e}"


def render_goals() -> str:
    """What all the newest benchmarks should reach, beside what they do on each machine."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for path in (path for topic in _benchmarks() for path in newest(topic)):
        measured = json.loads(path.read_text())
        machine = f"{measured['machine']['cpu']}, {measured['machine']['instruction_set']}"
        for goal in measured["goals"]:
            sign, unit = "≤" if goal["at_most"] else "≥", goal["unit"]
            line = measured["topic"], goal["what"], f"{sign} {goal['reach']:g}{unit}"
            reached = "reached" if goal["met"] else "not reached"
            found.setdefault(line, {})[machine] = f"{goal['measured']:.3g}{unit}, {reached}"
    if not found:
        return "Not measured yet.\n"
    machines = sorted({machine for cells in found.values() for machine in cells})
    rows = [[*line, *(cells.get(machine, "") for machine in machines)] for line, cells in found.items()]
    return _table(["benchmark", "goal", "reach", *machines], rows)


def _benchmarks() -> list[str]:
    names = {path.stem.rsplit("_", 1)[1] for path in (ROOT / "results").glob("*_bench-*.json")}
    return sorted(names)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, ""])


def _threads(machine: dict[str, Any]) -> str:
    return f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if value >= 2 else f"{value:.3f}".lstrip("0")
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8"), page), encoding="utf-8")
