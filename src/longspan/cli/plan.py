"""`longspan plan`: what a model asks of many devices that share one long sequence."""

from __future__ import annotations

import json
import math
import re
from enum import Enum
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.cli.quiet import quiet_transformers

if TYPE_CHECKING:
    from longspan.planning import ModelSizes, Plan
    from longspan.planning.plan import LayerPlan

_NUMBER = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_BYTES = {"": 1, "b": 1} | {
    f"{letter}{end}".lower(): base**power
    for power, letter in enumerate("KMGTP", 1)
    for end, base in (("B", 1000), ("iB", 1024))
}


class Mode(str, Enum):
    """What the devices do."""

    training = "training"
    checkpointing = "checkpointing"
    inference = "inference"


class Precision(str, Enum):
    """Of products, and of what is sent."""

    bf16 = "bf16"
    fp32 = "fp32"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_RECIPE",
            help="Directory or hub name of a model of longspan (its config.json is enough), or a recipe of `longspan "
            "train lm`, such as longnet-tiny.",
        ),
    ],
    tokens: Annotated[str, typer.Option(help="Of the sequence, such as 1e9.")],
    devices: Annotated[str, typer.Option(help="That share it, a part of equal length each.")] = "1",
    device_memory: Annotated[str | None, typer.Option(help="Of one device, such as 80GiB.")] = None,
    mode: Annotated[
        Mode, typer.Option(help="checkpointing: training that keeps each layer's input and computes the rest again.")
    ] = Mode.training,
    precision: Annotated[Precision, typer.Option(help="bf16 trains as torch's autocast does.")] = Precision.bf16,
    shard_weights: Annotated[
        bool, typer.Option("--shard-weights", help="Training of which each device keeps a share of the weights (FSDP).")
    ] = False,
    vocab_size: Annotated[int, typer.Option(min=1, help="Of a recipe's model.")] = 256,
    global_tokens: Annotated[
        int, typer.Option(min=0, help="Of an encoder: so many at the beginning see and are seen by all.")
    ] = 0,
    flops_per_second: Annotated[
        str | None, typer.Option(help="Of one device, such as 4e14: how long the busiest one computes.")
    ] = None,
    bytes_per_second: Annotated[
        str | None, typer.Option(help="That a device sends, such as 50GB: how long the busiest one sends.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Operations, memory and bytes on the wire of each device for one long sequence, and how many devices it takes."""
    asked = {
        "tokens": whole(tokens, "--tokens"),
        "devices": whole(devices, "--devices"),
        "shard_weights": shard_weights,
        "device_memory": device_memory and amount(device_memory, "--device-memory"),
        "operations_per_second": flops_per_second and amount(flops_per_second, "--flops-per-second", units=False),
        "bytes_per_second": bytes_per_second and amount(bytes_per_second, "--bytes-per-second"),
    }
    quiet_transformers()
    from longspan.planning import plan as make_plan

    sizes = _sizes(model, vocab_size)
    found = make_plan(sizes, mode=mode.value, precision=precision.value, global_tokens=global_tokens, **asked)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found)


def amount(text: str, option: str, *, units: bool = True) -> float:
    """The number that was given, in bytes where units may stand behind it. ValueError for what is none above 0."""
    found = _NUMBER.fullmatch(text)
    unit = found[2].lower() if found else None
    if not found or unit not in (_BYTES if units else ("",)):
        example = "80GiB, 50GB or 1e9" if units else "1e9 or 64"
        raise ValueError(f"{option} must be a number{' of bytes' * units} such as {example}; got {text!r}")
    value = float(re.sub("[_,]", "", found[1])) * _BYTES[unit or ""]
    if not 0 < value < math.inf:
        raise ValueError(f"{option} must be greater than 0; got {text!r}")
    return value


def whole(text: str, option: str) -> int:
    value = amount(text, option, units=False)
    if value != int(value):
        raise ValueError(f"{option} must be a whole number; got {text!r}")
    return int(value)


def _sizes(model: str, vocab_size: int) -> ModelSizes:
    import torch

    from longspan.planning import sizes_of
    from longspan.recipes.language_models import RECIPES, recipe_of

    if model not in RECIPES:
        try:
            return sizes_of(model)
        except OSError as error:
            raise OSError(
                f"there is no plan for {model!r}: it is no recipe ({', '.join(RECIPES)}), and no directory or hub name "
                f"of a model. {error}"
            ) from error
    with torch.device("meta"):  # no weights
        return sizes_of(recipe_of(model).model(vocab_size), name=model)


def _print(found: Plan) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    does = {"checkpointing": "training with checkpointing"}.get(found.mode, found.mode)
    console.print(
        f"{found.model}, {_short(found.parameters)} parameters: {does} in {found.precision} on {found.tokens:,} "
        f"tokens, {found.tokens_per_device:,} on each of {found.devices:,} devices. Figures are means of all devices, "
        f"with (the most) beside."
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    learns = found.mode != "inference"
    heads = ["layers", "see", "operations", "bytes sent"]
    heads += ["operations back", "bytes sent back", "activations kept"] if learns else []
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < 2 else "right")
    for names, layer in _alike(found.layers):
        cells = [
            _both(layer.forward_operations, layer.most_forward_operations),
            _both(layer.forward_bytes, layer.most_forward_bytes, "B"),
            _both(layer.backward_operations, layer.most_backward_operations),
            _both(layer.backward_bytes, layer.most_backward_bytes, "B"),
            f"({_short(layer.most_kept_bytes, 'B')})",
        ]
        table.add_row(names, layer.pattern, *cells[: len(heads) - 2])
    table.add_row("head", "", _short(found.head_operations), *[""] * (len(heads) - 3))
    console.print(table)
    console.print(f"operations:  {_both(found.operations, found.most_operations)} on each device")
    console.print(f"bytes sent:  {_both(found.sent_bytes, found.most_sent_bytes, 'B')} by each device", end="")
    what = "add up gradients" + " and gather weights" * found.shard_weights
    console.print(f", and {_short(found.reduced_bytes, 'B')} to {what}" if learns else "")
    memory = found.memory
    parts = {"weights": memory.weights, "gradients": memory.gradients, "Adam": memory.optimizer}
    parts |= {"activations": memory.kept, "working": memory.working}
    size, unit = (2**30, "GiB") if memory.total >= 2**30 else (2**20, "MiB")
    described = ", ".join(f"{name} {_in(value, size)}" for name, value in parts.items() if value)
    console.print(f"memory:      {_in(memory.total, size)} {unit} on the fullest device: {described}")
    if found.device_memory is not None:
        fits = "fits in" if found.fits else "does not fit in"
        least = "no number of devices is enough"
        if found.smallest_devices is not None:
            least = f"{found.smallest_devices:,} devices are enough, one less is not"
        if found.smallest_devices == 1:
            least = "one device is enough"
        console.print(f"             {fits} {_in(found.device_memory, size)} {unit}; {least}")
    for name, seconds in (("computing", found.computing_seconds), ("sending", found.sending_seconds)):
        if seconds is not None:
            console.print(f"{name + ':':12} {seconds:,.3g} s on the busiest device")
    for note in found.notes:
        console.print(f"note: {note}")


def _alike(layers: tuple[LayerPlan, ...]) -> list[tuple[str, LayerPlan]]:
    """Runs of equal layers, with their numbers."""

    def what(layer: LayerPlan) -> dict[str, object]:
        return {name: value for name, value in vars(layer).items() if name != "layer"}

    found = []
    for _, run in groupby(layers, what):
        some = list(run)
        found.append((str(some[0].layer) + (f"-{some[-1].layer}" if len(some) > 1 else ""), some[0]))
    return found


def _both(mean: float, most: float, unit: str = "") -> str:
    return _short(mean, unit) + (f" ({_short(most, unit)})" if most > 1.001 * mean else "")


def _short(value: float, unit: str = "") -> str:
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{float(f'{value:.3g}') / 10**power:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}".strip()


def _in(value: float, size: int) -> str:
    return f"{value / size:,.3g}" if value < 1000 * size else f"{value / size:,.0f}"
