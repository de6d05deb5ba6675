"""The plan: what each of many devices computes, keeps and sends for one long sequence, and how many of them it takes.

The sequence lies on the devices in contiguous equal shards, and attention is `longspan.distributed`'s. Every device
keeps all weights, or, as `longspan train lm --shard-weights` has it, a share of them, of their gradients and of Adam's
moments (FSDP2): it then gathers a layer's weights while it computes with them. In bf16 a training computes as torch's
autocast does: weights, their gradients, Adam's two moments and the residual stream stay in float32. What a formula
leaves out is below a few percent, or said in `notes`.

Shapes: n tokens of a device, C model width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from longspan.attention import Full
from longspan.planning.attention import Heads, Load, Ranks, describe, load_of
from longspan.planning.model import LayerSizes, ModelSizes, sizes_of

SHOWN_RANKS, SEARCHED_RANKS = 256, 9  # of more devices, so many at even distances are looked at
MOST_TOKENS, MOST_DEVICES = 10**12, 2**20
Precision = Literal["fp32", "bf16"]
Mode = Literal["inference", "training", "checkpointing"]


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer on one device. Operations are multiplications and additions, a product and its sum two of them.

    Each figure is of the device that has most of it (`most_`), and the mean of all.
    bytes: sent to other devices, in the forward and in the backward pass. kept: bytes for the backward pass, 0 in
    inference; with "checkpointing" only while the layer is computed again.
    """

    layer: int
    pattern: str
    parameters: int
    forward_operations: float
    most_forward_operations: float
    backward_operations: float
    most_backward_operations: float
    forward_bytes: float
    most_forward_bytes: float
    backward_bytes: float
    most_backward_bytes: float
    most_kept_bytes: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device that needs most. kept: of activations for the backward pass. working: at the worst moment
    besides."""

    weights: float
    gradients: float
    optimizer: float
    kept: float
    working: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.kept + self.working


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One pass over the sequence, or one training step of it, on each of `devices`. See `LayerPlan` for its figures.

    head_operations: of what stands before and after the layers, forward. operations: of the whole step.
    sent_bytes: of the whole step without reduced_bytes, which add up the gradients of weights and gather weights that
    are sharded (rings).
    fits, smallest_devices: for the memory that was asked for. One device less than smallest_devices does not fit; much
    fewer may, where their edges cut no segments. None where no number fits.
    computing_seconds, sending_seconds: of the busiest device at the rates that were asked for; a step takes between
    the larger of them, where sending hides behind computing, and their sum.
    """

    model: str
    mode: Mode
    precision: Precision
    shard_weights: bool
    tokens: int
    devices: int
    tokens_per_device: int
    global_tokens: int
    parameters: int
    layers: tuple[LayerPlan, ...]
    head_operations: float
    operations: float
    most_operations: float
    sent_bytes: float
    most_sent_bytes: float
    reduced_bytes: float
    memory: Memory
    device_memory: float | None = None
    fits: bool | None = None
    smallest_devices: int | None = None
    computing_seconds: float | None = None
    sending_seconds: float | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        found["memory"]["total"] = self.memory.total
        return found


def plan(
    model: str | Path | PreTrainedConfig | nn.Module | ModelSizes,
    *,
    tokens: int,
    devices: int,
    device_memory: float | None = None,
    mode: Mode = "training",
    precision: Precision = "bf16",
    shard_weights: bool = False,
    global_tokens: int = 0,
    operations_per_second: float | None = None,
    bytes_per_second: float | None = None,
) -> Plan:
    """What `devices` do for a sequence of `tokens`.

    device_memory: bytes of one device; the plan then says whether it fits, and the smallest number of devices
    that does. mode: "inference", "training", or "checkpointing", training that keeps the inputs of layers and computes
    the rest again. shard_weights: in training, each device keeps its share of weights, gradients and optimizer.
    global_tokens: of an encoder, at the beginning. Rates are of one device; bytes_per_second each way.
    Raises what `sizes_of` raises, ValueError for numbers that make no sense, NotImplementedError for patterns that
    have no closed form.
    """
    sizes = model if isinstance(model, ModelSizes) else sizes_of(model)
    _check(sizes, tokens, devices, global_tokens, mode, precision, shard_weights)
    for name, value in (
        ("device_memory", device_memory),
        ("operations_per_second", operations_per_second),
        ("bytes_per_second", bytes_per_second),
    ):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be greater than 0; got {value}")
    step = _Step(sizes, tokens, mode, precision, shard_weights, global_tokens)
    found = step.on(devices, SHOWN_RANKS)
    if device_memory is not None:

        def fits(count: int) -> bool:
            return step.on(count, SEARCHED_RANKS).memory.total <= device_memory

        smallest = _smallest(fits, min(tokens, MOST_DEVICES))
        found = replace(
            found,
            device_memory=device_memory,
            fits=found.memory.total <= device_memory,
            smallest_devices=smallest,
        )
    if operations_per_second is not None:
        found = replace(found, computing_seconds=found.most_operations / operations_per_second)
    if bytes_per_second is not None:
        found = replace(found, sending_seconds=(found.most_sent_bytes + found.reduced_bytes) / bytes_per_second)
    return found


def _check(
    sizes: ModelSizes, tokens: int, devices: int, global_tokens: int, mode: str, precision: str, shard_weights: bool
) -> None:
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"a plan is for 1 to {MOST_TOKENS:,} tokens; got {tokens:,}")
    if not 1 <= devices <= tokens or devices > MOST_DEVICES:
        raise ValueError(
            f"each device holds a token at least, and a plan is for {MOST_DEVICES:,} devices at most; got "
            f"{devices:,} devices for {tokens:,} tokens"
        )
    if not 0 <= global_tokens <= tokens:
        raise ValueError(f"global_tokens must lie between 0 and the {tokens:,} tokens; got {global_tokens:,}")
    if mode not in ("inference", "training", "checkpointing"):
        raise ValueError(f"mode must be 'inference', 'training' or 'checkpointing'; got {mode!r}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16'; got {precision!r}")
    if shard_weights and mode == "inference":
        raise ValueError("weights are sharded in training only; leave out shard_weights, or plan a training")


def _smallest(fits: Callable[[int], bool], most: int) -> int | None:
    """A number that fits where one less does not: the smallest, if all larger ones fit. None where the most do not."""
    enough = 1
    while not fits(enough):
        if enough == most:
            return None
        enough = min(2 * enough, most)
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if fits(middle):
            enough = middle
        else:
            too_few = middle
    return enough


@dataclass(frozen=True)
class _Step:
    """A pass over the sequence, for any number of devices."""

    sizes: ModelSizes
    tokens: int
    mode: Mode
    precision: Precision
    shard_weights: bool
    global_tokens: int

    @property
    def learns(self) -> bool:
        return self.mode != "inference"

    @property
    def size(self) -> int:
        """Bytes of a number in products, and of what is sent."""
        return 4 if self.precision == "fp32" else 2

    @property
    def stream(self) -> int:
        """Bytes of a number between the layers."""
        return 4 if self.learns else self.size

    def on(self, devices: int, looked_at: int) -> Plan:
        """looked_at: of more devices than that, so many at even distances stand for all."""
        sizes, ranks = self.sizes, Ranks(self.tokens, devices)
        step = max(1.0, (devices - 1) / (looked_at - 1))
        here = sorted({round(place * step) for place in range(min(devices, looked_at))})
        tokens = [ranks.start(rank + 1) - ranks.start(rank) for rank in here]
        known: dict[Any, list[Load]] = {}
        layers: list[list[_Share]] = []
        for layer in sizes.layers:
            kind = layer.pattern, layer.heads, layer.head_width
            if kind not in known:
                heads = Heads(layer.heads, layer.head_width, self.size)
                known[kind] = [load_of(layer.pattern, ranks, rank, heads, self.global_tokens) for rank in here]
            layers.append([self._share(layer, load, held) for load, held in zip(known[kind], tokens, strict=True)])
        devices_shares = list(zip(*layers, strict=True))
        passes = 3 if self.learns else 1
        operations = [
            sum(share.forward + share.backward for share in shares) + passes * 2.0 * sizes.matrix * held
            for shares, held in zip(devices_shares, tokens, strict=True)
        ]
        sent = [sum(share.sent + share.returned for share in shares) for shares in devices_shares]
        memories = [self._memory(shares, held, devices) for shares, held in zip(devices_shares, tokens, strict=True)]
        return Plan(
            model=sizes.name,
            mode=self.mode,
            precision=self.precision,
            shard_weights=self.shard_weights,
            tokens=self.tokens,
            devices=devices,
            tokens_per_device=max(tokens),
            global_tokens=self.global_tokens,
            parameters=sizes.parameters,
            layers=tuple(
                _layer_plan(number, layer, shares)
                for number, (layer, shares) in enumerate(zip(sizes.layers, layers, strict=True), 1)
            ),
            head_operations=2.0 * sizes.matrix * self.tokens / devices,
            operations=_mean(operations),
            most_operations=max(operations),
            sent_bytes=_mean(sent),
            most_sent_bytes=max(sent),
            reduced_bytes=self._reduced(devices),
            memory=max(memories, key=lambda memory: memory.total),
            notes=self._notes(devices, len(here)),
        )

    def _reduced(self, devices: int) -> float:
        """A ring adds up gradients in two rounds, and gathers or scatters in one."""
        sizes = self.sizes
        # Sharded: layers are gathered forward and backward, all else once, and gradients are scattered.
        rounds = 2 * sizes.parameters + self.shard_weights * sum(layer.parameters for layer in sizes.layers)
        return 4 * rounds * (devices - 1) / devices if self.learns else 0.0

    def _share(self, layer: LayerSizes, load: Load, tokens: int) -> _Share:
        attention = 4.0 * layer.head_width * load.pairs  # of queries and keys, and of probabilities and values
        products = 2.0 * layer.matrix * tokens
        if self._has_globals(layer) and layer.global_projections:
            products += 4.0 * layer.width * layer.inner * tokens  # their own keys and values
        forward = products + attention
        again = self.mode == "checkpointing"
        # The backward pass of attention computes the scores again: five products of queries and keys, not two.
        backward = 2 * products + 2.5 * attention + again * forward if self.learns else 0.0
        kept, attended = self._kept(layer, load, tokens)
        return _Share(
            forward,
            backward,
            load.sent,
            load.returned + again * load.sent if self.learns else 0,
            kept if self.learns else 0.0,
            self._working(layer, load, tokens, kept, attended),
        )

    def _has_globals(self, layer: LayerSizes) -> bool:
        return self.global_tokens > 0 and layer.pattern != Full()

    def _kept(self, layer: LayerSizes, load: Load, tokens: int) -> tuple[float, float]:
        """Bytes for a layer's backward pass; and those of them that attention and what stands before it need."""
        row = layer.head_width * self.size
        attended = tokens * layer.heads * (layer.attended(load.held) * row + 4.0)
        attended += load.rows * row + load.wide_rows * layer.head_width * 4 + load.other
        if self._has_globals(layer):
            attended += tokens * layer.inner * (2 * layer.global_projections + 1) * self.size
        kept = tokens * (layer.kept * self.size + layer.kept_stream * self.stream + 8 * layer.norms)
        before = tokens * (2 * layer.width * self.size + layer.width * self.stream)  # the projections' inputs, a norm's
        return attended + kept, attended + before

    def _working(self, layer: LayerSizes, load: Load, tokens: int, kept: float, attended: float) -> float:
        """Bytes at the worst moment of a layer, beside what other layers keep; in training, of its backward pass."""
        width, inner, size = layer.width, layer.heads * layer.head_width, self.size
        if self.learns:
            gradients = width * self.stream + (size < 4) * width * size
            feed_forward = kept + tokens * (gradients + layer.ffn_width * size)
            elsewhere = 8 * inner * (4 if load.wide_rows else size)  # of parts, before they are put together
            own = 16 * inner  # of q, k, v and what they gave
            return max(feed_forward, attended + tokens * (width * self.stream + max(own, elsewhere * (load.rows > 0))))
        held = (2 + layer.norms_first) * width  # what the layers began with, this one's input, and its norm
        given = held + 3 * layer.inner + (3 if layer.widened else 2 if layer.turned else 0) * inner
        moments = [float(given + inner - layer.inner if layer.widened else given + (1 + layer.subln) * inner + width)]
        if layer.turned and size < 4:  # turned in float32
            moments.append(held + 3 * layer.inner + 2 * inner + 8 * inner / size)
        if load.wide_rows:  # parts that are added up in float32
            moments.append(given + 20 * inner / size + 2 * load.received / size / tokens)
        elif load.rows:
            moments.append(given + load.rows * layer.head_width / tokens)
        feed_forward = held + width + 2 * layer.ffn_width + layer.tail
        return max(*moments, feed_forward) * size * tokens

    def _memory(self, shares: tuple[_Share, ...], tokens: int, devices: int) -> Memory:
        sizes = self.sizes
        weights = sizes.parameters * self.stream
        shared = tokens * (sizes.position_bytes + 16.0)  # token ids and labels
        logits = 4.0 * sizes.vocabulary * tokens
        layer = max(share.working for share in shares)
        if not self.learns:
            state = tokens * sizes.width * self.size
            last = state + tokens * sizes.vocabulary * self.size
            worst = shared + max(layer, last)
            return Memory(weights=weights, gradients=0, optimizer=0, kept=0, working=worst)
        around = tokens * (sizes.kept * self.size + sizes.kept_stream * self.stream + 8 * sizes.norms)
        share = devices if self.shard_weights else 1
        copies = 2 * sizes.matrices * (self.precision == "bf16")  # autocast's, which the backward pass needs
        gathered = 0.0
        if self.shard_weights:
            weights /= share
            copies *= self.mode != "checkpointing"  # computed again with a layer's weights
            # A layer's weights and their gradients, the weights of the next one and the gradients on their way of the
            # one before; of all else weights and gradients, from first to last.
            largest = 4.0 * max(part.parameters for part in sizes.layers)
            others = 4.0 * (sizes.parameters - sum(part.parameters for part in sizes.layers))
            gathered = 2 * others + max(4 * largest, others)
        if self.mode == "checkpointing":
            held = tokens * sizes.width * self.stream * len(shares)
            twice = sizes.layers[0].norms_first or self.precision == "fp32"  # a layer's input is also what it keeps
            layers = held + layer - twice * tokens * sizes.width * self.stream
        else:
            held = sum(share.kept for share in shares)
            layers = held + max(share.working - share.kept for share in shares)
        if not sizes.vocabulary:
            around += tokens * sizes.width * self.stream  # the last state
        kept = held + around + shared + logits  # the loss keeps probabilities
        worst = max(2 * logits, layers + shared - kept)  # gradients of probabilities and of logits; or of a layer
        return Memory(
            weights=weights + copies,
            gradients=4.0 * sizes.parameters / share,
            optimizer=8.0 * sizes.parameters / share,
            kept=kept,
            working=worst + gathered,
        )

    def _notes(self, devices: int, looked_at: int) -> tuple[str, ...]:
        sizes = self.sizes
        notes = []
        if sizes.max_tokens is not None and self.tokens > sizes.max_tokens:
            notes.append(
                f"{sizes.what_ends} beyond {sizes.max_tokens:,} tokens: this model cannot run so many as it is; the "
                "plan is for one that differs in nothing else"
            )
        if devices > 1 and any(getattr(layer.pattern, "dilation", 1) != 1 for layer in sizes.layers):
            notes.append(
                "windows with a dilation are computed also for the keys that other devices send, which takes somewhat "
                "more operations and memory than this"
            )
        if self.shard_weights and self.precision == "bf16" and self.mode == "training":
            notes.append(
                "the backward pass needs autocast's bf16 copies of all matrices, which are not sharded: mode "
                "'checkpointing' does without them"
            )
        if devices > looked_at:
            notes.append(f"the most and the mean are of {looked_at} devices at even distances")
        return tuple(notes)


class _Share(NamedTuple):
    """One device's part of one layer: operations and bytes."""

    forward: float
    backward: float
    sent: float
    returned: float
    kept: float
    working: float


def _layer_plan(number: int, layer: LayerSizes, shares: list[_Share]) -> LayerPlan:
    columns = [[float(value) for value in column] for column in zip(*shares, strict=True)]
    forward, backward, sent, returned, kept, _ = columns
    return LayerPlan(
        layer=number,
        pattern=describe(layer.pattern),
        parameters=layer.parameters,
        forward_operations=_mean(forward),
        most_forward_operations=max(forward),
        backward_operations=_mean(backward),
        most_backward_operations=max(backward),
        forward_bytes=_mean(sent),
        most_forward_bytes=max(sent),
        backward_bytes=_mean(returned),
        most_backward_bytes=max(returned),
        most_kept_bytes=max(kept),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
