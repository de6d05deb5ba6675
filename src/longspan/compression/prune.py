"""Structured pruning: the heads and feed-forward units that matter least are cut out, and the model is smaller.

Shapes: H heads, D head width, C model width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longspan.compression.cost import Costs, measure_costs
from longspan.compression.importance import Importance, encoder_of, measure_importance
from longspan.models.convert import as_ours
from longspan.models.encoder import EncoderConfig, activation
from longspan.models.model import LongspanModel, LongspanPreTrainedModel
from longspan.models.packed import Precision

FEWEST_HEADS, FEWEST_UNITS = 1, 8  # that a choice across layers leaves in each


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What to keep.

    heads, ffn: attention heads and feed-forward units a layer; None keeps all.
    layers: "uniform" keeps as many in every layer (FastFormers); "global" keeps the best of the whole model, and heads
        and ffn are means over the layers.
    keep_last: the last layer stays whole, and heads and ffn are of those below it. Of the last layer of a dense BERT,
        RoBERTa or DistilBERT that looks at a row's first token, a packed encoder computes little more than that token.
    speedup: in place of heads and ffn: how many times as fast the model is to be. Heads and units of all layers
        compete by importance per measured second.
    normalize: divide importance by its norm in each layer before layers compete.
    activation: another activation for the feed-forward, such as "relu" for "gelu"; the model must learn it.
    """

    heads: int | None = None
    ffn: int | None = None
    layers: Literal["uniform", "global"] = "uniform"
    keep_last: bool = False
    speedup: float | None = None
    normalize: bool = False
    activation: str | None = None

    def __post_init__(self):
        if self.layers not in ("uniform", "global"):
            raise ValueError(f"layers must be 'uniform' or 'global'; got {self.layers!r}")
        if self.heads is None and self.ffn is None and self.speedup is None and self.activation is None:
            raise ValueError("nothing to prune: give heads, ffn, speedup or activation")
        if self.speedup is not None and (self.heads is not None or self.ffn is not None):
            raise ValueError("give either speedup, which chooses heads and units by itself, or heads and ffn")
        if self.keep_last and self.heads is None and self.ffn is None:
            raise ValueError("keep_last is about heads and ffn: give one of them, or leave it out")
        if self.speedup is not None and not 1 <= self.speedup < float("inf"):
            raise ValueError(f"speedup must be a number from 1 on; got {self.speedup}")
        for name, least in (("heads", FEWEST_HEADS), ("ffn", 1 if self.layers == "uniform" else FEWEST_UNITS)):
            count = getattr(self, name)
            if count is not None and count < least:
                raise ValueError(
                    f"{name} must be at least {least} a layer, for a layer without them is none; got {count}"
                )
        if self.activation is not None:
            activation(self.activation)


class Kept(NamedTuple):
    """The numbers of the heads and units that stay, in rising order, layer by layer."""

    heads: tuple[tuple[int, ...], ...]
    units: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> list[tuple[int, int]]:
        """(heads, units) of every layer."""
        return [(len(heads), len(units)) for heads, units in zip(self.heads, self.units, strict=True)]


def prune(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    pruning: Pruning,
    *,
    costs: Costs | None = None,
    precision: Precision | None = None,
) -> Any:
    """A smaller model, of ours: what `pruning` keeps of this one, with its outputs as if the rest were masked.

    model: ours, or a BERT, RoBERTa, DistilBERT, Longformer or ModernBERT of transformers. It stays as it is.
    batches: labeled calibration batches, as `measure_importance` takes them; read only where there is a choice.
    costs: of the layers, for a speedup; measured with `precision` when left out.
    Raises ValueError for more heads or units than there are, for a speedup out of reach, for batches without labels or
    without rows; NotImplementedError for other families.
    """
    ours = as_ours(model)
    config = encoder_of(ours).config
    _check_counts(pruning, config)
    if pruning.heads is None and pruning.ffn is None and pruning.speedup is None:
        kept = _keep_all(config)
    else:
        importance = measure_importance(ours, batches)
        if pruning.speedup is not None and costs is None:
            costs = measure_costs(ours, precision=precision)
        kept = choose(importance, pruning, costs)
    return cut(ours, kept, activation=pruning.activation)


def choose(importance: Importance, pruning: Pruning, costs: Costs | None = None) -> Kept:
    """What stays. costs: read for a speedup only. Equal scores keep the lower layer and number."""
    scores = importance.normalized() if pruning.normalize else importance
    if pruning.speedup is not None:
        if costs is None:
            raise ValueError("a speedup is chosen by costs: pass measure_costs(model), or your own")
        return _within_cost(scores, pruning.speedup, costs)
    pick = _best_of_each if pruning.layers == "uniform" else _best_of_all

    def of(parts: Sequence[Tensor], count: int | None, fewest: int) -> tuple[tuple[int, ...], ...]:
        below = len(parts) - pruning.keep_last
        return pick(parts[:below], count, fewest) + _best_of_each(parts[below:], None, fewest)

    return Kept(heads=of(scores.heads, pruning.heads, FEWEST_HEADS), units=of(scores.units, pruning.ffn, FEWEST_UNITS))


def cut(model: LongspanPreTrainedModel, kept: Kept, *, activation: str | None = None) -> Any:
    """A copy of a model of ours that holds only these heads and units: q, k, v, their global twins, and outputs."""
    encoder = encoder_of(model)
    described = encoder.config
    prefix = next(name for name, module in model.named_modules() if module is encoder) + ".blocks."
    weights = dict(model.state_dict())
    blocks = []
    for layer, (block, heads, units) in enumerate(zip(described.blocks, *kept, strict=True)):
        inner, device = block.heads * block.head_width, model.device
        columns = torch.arange(inner, device=device).view(block.heads, -1)[list(heads)].flatten()
        rows = torch.cat([part * inner + columns for part in range(3)])  # of q, k and v
        hidden = torch.tensor(units, device=device)
        taken = torch.cat((hidden, block.ffn_width + hidden)) if described.gated else hidden
        for name, index, axis in (
            ("attention.qkv.weight", rows, 0),
            ("attention.qkv.bias", rows, 0),
            ("attention.qkv_global.weight", rows, 0),
            ("attention.qkv_global.bias", rows, 0),
            ("attention.out.weight", columns, 1),
            ("ffn_in.weight", taken, 0),
            ("ffn_in.bias", taken, 0),
            ("ffn_out.weight", hidden, 1),
        ):
            key = f"{prefix}{layer}.{name}"
            if key in weights:
                weights[key] = weights[key].index_select(axis, index)
        blocks.append(replace(block, heads=len(heads), ffn_width=len(units)))
    smaller = replace(described, blocks=tuple(blocks), activation=activation or described.activation)
    return rebuilt(model, smaller, weights)


def rebuilt(model: LongspanPreTrainedModel, encoder: EncoderConfig, weights: Mapping[str, Tensor]) -> Any:
    """A model like this one around another encoder, with these weights: of its class, dtype, device and mode."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.encoder = encoder.to_dict()
    if isinstance(model, LongspanModel):
        config.pooler = model.pooler is not None
    other: Any = type(model)(config)
    other.to(device=model.device, dtype=model.dtype)
    other.load_state_dict(weights)
    return other.train(model.training)


def _check_counts(pruning: Pruning, config: EncoderConfig) -> None:
    blocks = config.blocks[:-1] if pruning.keep_last else config.blocks
    if not blocks:
        raise ValueError("keep_last leaves nothing to prune in a model of one layer")
    for name, wanted, counts in (
        ("heads", pruning.heads, [block.heads for block in blocks]),
        ("feed-forward units", pruning.ffn, [block.ffn_width for block in blocks]),
    ):
        there = min(counts) if pruning.layers == "uniform" else sum(counts) / len(counts)
        if wanted is not None and wanted > there:
            raise ValueError(
                f"cannot keep {wanted} {name} a layer: the layers have {', '.join(map(str, counts))}; "
                f"{int(there)} is the most"
            )


def _keep_all(config: EncoderConfig) -> Kept:
    return Kept(
        heads=tuple(tuple(range(block.heads)) for block in config.blocks),
        units=tuple(tuple(range(block.ffn_width)) for block in config.blocks),
    )


def _best(scores: Tensor, count: int) -> list[int]:
    return scores.argsort(descending=True, stable=True)[:count].tolist()


def _best_of_each(scores: Sequence[Tensor], count: int | None, _: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted(_best(layer, len(layer) if count is None else count))) for layer in scores)


def _best_of_all(scores: Sequence[Tensor], count: int | None, fewest: int) -> tuple[tuple[int, ...], ...]:
    if count is None:
        return _best_of_each(scores, None, fewest)
    kept = [set(_best(layer, fewest)) for layer in scores]
    ranked = [
        (layer, index) for layer, row in enumerate(scores) for index in range(len(row)) if index not in kept[layer]
    ]
    ranked.sort(key=lambda place: -float(scores[place[0]][place[1]]))
    left = count * len(scores) - sum(map(len, kept))
    for layer, index in ranked[: max(0, left)]:
        kept[layer].add(index)
    return tuple(tuple(sorted(layer)) for layer in kept)


def _within_cost(scores: Importance, speedup: float, costs: Costs) -> Kept:
    """All heads and units whose importance per cost is above one threshold, as low as the budget allows."""
    full = [(len(heads), len(units)) for heads, units in zip(scores.heads, scores.units, strict=True)]
    kept = (
        [set(_best(layer, FEWEST_HEADS)) for layer in scores.heads],
        [set(_best(layer, FEWEST_UNITS)) for layer in scores.units],
    )
    spent = costs.of([(len(heads), len(units)) for heads, units in zip(*kept, strict=True)])
    budget = costs.of(full) / speedup
    if spent > budget:
        raise ValueError(
            f"no pruning makes this model {speedup:g} times as fast: with {FEWEST_HEADS} head and {FEWEST_UNITS} "
            f"units in each of its {len(full)} layers it would be {costs.of(full) / spent:.2f} times as fast; "
            f"use fewer layers (distillation)"
        )
    ranked = []
    for layer, cost in enumerate(costs.layers):
        for kind, row, price in ((0, scores.heads[layer], cost.per_head), (1, scores.units[layer], cost.per_unit)):
            worth = (row / price).tolist() if price > 0 else [float("inf")] * len(row)
            ranked += [
                (worth[index], layer, kind, index, price) for index in range(len(row)) if index not in kept[kind][layer]
            ]
    ranked.sort(key=lambda item: -item[0])
    for _, layer, kind, index, price in ranked:
        spent += price
        if spent > budget * (1 + 1e-12):
            break
        kept[kind][layer].add(index)
    heads, units = (tuple(tuple(sorted(layer)) for layer in part) for part in kept)
    return Kept(heads=heads, units=units)
