"""What heads and feed-forward units cost, measured: a layer takes fixed + per_head * heads + per_unit * units.

Shapes: B batch, N tokens, C model width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from longspan.compression.importance import encoder_of
from longspan.models.encoder import BlockConfig, Encoder, EncoderConfig
from longspan.models.packed import Precision, pack

_SECONDS_EACH, _FEWEST_ROUNDS = 0.1, 5


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The time of one layer, in any unit, as a line in its number of heads and of units."""

    fixed: float = 0.0
    per_head: float = 0.0
    per_unit: float = 0.0

    def __post_init__(self):
        if min(self.fixed, self.per_head, self.per_unit) < 0:
            raise ValueError(f"costs must not be negative; got {self}")

    def of(self, heads: int, units: int) -> float:
        return self.fixed + self.per_head * heads + self.per_unit * units


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The layers from bottom to top, and what no pruning makes faster (embeddings)."""

    layers: tuple[LayerCost, ...]
    rest: float = 0.0

    def of(self, shape: Sequence[tuple[int, int]]) -> float:
        """The time of a model whose layers have these (heads, units)."""
        return self.rest + sum(layer.of(*counts) for layer, counts in zip(self.layers, shape, strict=True))


def measure_costs(model: nn.Module, *, rows: int = 8, tokens: int = 256, precision: Precision | None = None) -> Costs:
    """Seconds for a batch of rows x tokens, fitted to timings of single layers with all and with half of their parts.

    Layers that differ in nothing but their counts are timed once. precision: what the model will run in, as in
    `accelerate`, where the last layer of a classifier may compute its first token alone; None times plain PyTorch. The
    time is that of this machine with the threads that torch is set to.
    """
    encoder = encoder_of(model)
    described = encoder.config
    head = getattr(model, "described", None)
    last = len(described.blocks) - 1 if precision is not None and head is not None and head.reads_first_only else None
    kinds: dict[tuple[BlockConfig, bool], LayerCost] = {}
    layers = []
    for number, block in enumerate(described.blocks):
        kind = replace(block, heads=1, ffn_width=1), number == last
        if kind not in kinds:
            same = [other for other in described.blocks if replace(other, heads=1, ffn_width=1) == kind[0]]
            heads, units = max(other.heads for other in same), max(other.ffn_width for other in same)
            kinds[kind] = _fit(described, block, heads, units, rows, tokens, precision, first_only=kind[1])
        layers.append(kinds[kind])
    return Costs(layers=tuple(layers), rest=_time_embeddings(model, rows, tokens))


def _fit(
    config: EncoderConfig,
    block: BlockConfig,
    heads: int,
    units: int,
    rows: int,
    tokens: int,
    precision: Any,
    *,
    first_only: bool,
) -> LayerCost:
    shapes = sorted({(h, f) for h in (heads, (heads + 1) // 2) for f in (units, (units + 1) // 2)})
    x = torch.randn(rows, tokens, config.width)
    global_mask = None
    if block.global_projections:
        global_mask = torch.zeros(rows, tokens, dtype=torch.bool)
        global_mask[:, 0] = True
    layers: list[Any] = []
    for h, f in shapes:
        encoder = Encoder(replace(config, blocks=(replace(block, heads=h, ffn_width=f),))).eval()
        packed: Any = encoder if precision is None else pack(encoder, precision)
        layers.append(packed.first_tokens if first_only else packed)
    times = _seconds([lambda layer=layer: layer(x, None, global_mask) for layer in layers])
    design = torch.tensor([(1.0, h, f) for h, f in shapes], dtype=torch.float64)
    fitted = torch.linalg.pinv(design) @ torch.tensor(times, dtype=torch.float64)
    fixed, per_head, per_unit = fitted.tolist()
    if min(per_head, per_unit) > 0:
        return LayerCost(fixed=max(0.0, fixed), per_head=per_head, per_unit=per_unit)
    # Noise, or a layer too small for its parts to show: the whole time, shared out by multiplications for a token.
    projections = 8 if block.global_projections else 4
    of_head = block.head_width * (projections * config.width + 2 * tokens)
    of_unit = (3 if config.gated else 2) * config.width
    each = max(times) / (heads * of_head + units * of_unit)
    return LayerCost(per_head=each * of_head, per_unit=each * of_unit)


def _time_embeddings(model: nn.Module, rows: int, tokens: int) -> float:
    embeddings = getattr(getattr(model, "base_model", model), "embeddings", None)
    limit = getattr(getattr(embeddings, "config", None), "max_tokens", None)
    if not callable(embeddings):
        return 0.0
    input_ids = torch.ones(rows, min(tokens, limit or tokens), dtype=torch.long)
    return _seconds([lambda: embeddings(input_ids)])[0]


def _seconds(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """The quickest time of each; they take turns, so that a slow spell of the machine strikes all."""
    best = [float("inf")] * len(runs)
    with torch.inference_mode():
        for run in runs:
            run()  # warms up
        begun, rounds = time.perf_counter(), 0
        while rounds < _FEWEST_ROUNDS or time.perf_counter() - begun < _SECONDS_EACH * len(runs):
            for number, run in enumerate(runs):
                before = time.perf_counter()
                run()
                best[number] = min(best[number], time.perf_counter() - before)
            rounds += 1
    return best
