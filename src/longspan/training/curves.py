"""The curves of training runs, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def require_matplotlib() -> None:
    """ImportError now rather than when a long run is over."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("training draws its curves: pip install longspan[train]") from error


def draw_curves(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], file: str | Path, *, unit: str, phases: Sequence[int] = ()
) -> None:
    """Bits per `unit` over tokens seen, in training (thin) and on dev (points), and the learning rate, as a PNG.

    runs: name -> the Trainer's log with `tokens_seen`, `bits`, `eval_bits` and `learning_rate`. phases: tokens seen
    where a new phase begins.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for number, (name, entries) in enumerate(runs.items()):
        color = f"C{number}"
        steps = [entry for entry in entries if "bits" in entry]
        measured = [entry for entry in entries if "eval_bits" in entry]
        seen = [entry["tokens_seen"] / 1e6 for entry in steps]
        above.plot(seen, [entry["bits"] for entry in steps], color=color, linewidth=0.7, alpha=0.6)
        where = [entry["tokens_seen"] / 1e6 for entry in measured]
        above.plot(
            where, [entry["eval_bits"] for entry in measured], "o-", color=color, markersize=3, label=f"{name}, dev"
        )
        below.plot(seen, [entry["learning_rate"] for entry in steps], color=color)
    values = sorted(
        entry[key] for entries in runs.values() for entry in entries for key in ("bits", "eval_bits") if key in entry
    )
    if values:  # the first steps of an untrained model would take all the height
        above.set_ylim(values[0] - 0.05, values[min(len(values) - 1, int(0.9 * len(values)))] + 0.3)
    for tokens in phases:
        for axes in (above, below):
            axes.axvline(tokens / 1e6, color="gray", linewidth=0.6, linestyle=":")
    above.set_ylabel(f"bits per {unit}")
    above.grid(alpha=0.3)
    above.legend()
    below.set_ylabel("learning rate")
    below.set_xlabel("million tokens seen")
    below.grid(alpha=0.3)
    figure.savefig(file)
