"""The encoder for inference: weights packed once, rows without padding, memory used again from layer to layer.

The tokens of a batch stand in one matrix of rows. A layer is attention over all rows, and then everything else in
chunks of rows that stay in the processor's cache: output projection, norm, feed-forward, norm, and the query, key and
value projection of the next layer.

Shapes: B batch, N tokens, C model width, H heads, D head width, T rows, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longspan.attention import Full, attend
from longspan.kernels import rows
from longspan.kernels.layer import Dense, Layer
from longspan.kernels.rows import ACTIVATIONS, Norm, Product, Turn
from longspan.models.checkpoints import mismatch
from longspan.models.encoder import BlockConfig, Encoder, EncoderConfig, Rotary, activation
from longspan.models.global_rows import GlobalProjections
from longspan.models.linear import KernelLinear, Linear, Weight, make_linear
from longspan.models.ragged import Ragged, depends_on_distance_only
from longspan.models.workspace import Workspace

Precision = Literal["fp32", "bf16", "fp16", "int8"]
PRECISIONS: dict[str, tuple[Precision, ...]] = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp32", "bf16", "fp16")}


def check_precision(precision: Any, device: torch.device) -> None:
    """ValueError for what no encoder on this device is packed in; NotImplementedError for another kind of device."""
    known = PRECISIONS.get(device.type)
    if known is None:
        raise NotImplementedError(f"encoders are packed on {' and '.join(PRECISIONS)}; the model is on {device}")
    if precision not in known:
        raise ValueError(f"precision must be {', '.join(map(repr, known))} on {device.type}; got {precision!r}")


def pack(encoder: Encoder, precision: Precision) -> PackedEncoder:
    """The same encoder, packed for inference in "fp32", "bf16" or "int8". The given one stays as it is.

    Raises ValueError for another precision and, naming it, for a weight that holds NaN or infinity;
    NotImplementedError for an encoder that is not on the CPU.
    """
    return PackedEncoder(encoder.config, encoder.state_dict(), precision)


def check_weights(config: EncoderConfig, weights: Mapping[str, Tensor]) -> None:
    """Whether these are the weights of such an `Encoder`, all of them, finite and on the CPU.

    Raises ValueError and NotImplementedError that name the weight.
    """
    with torch.device("meta"):
        expected = Encoder(config).state_dict()
    missing = expected.keys() - weights.keys()
    unread = {name for name in weights.keys() - expected.keys() if name.removesuffix(".scale") not in expected}
    if missing or unread:
        raise ValueError(mismatch("these are not the weights of this encoder", unread, missing))
    for name, weight in weights.items():
        wanted = expected[name].shape if name in expected else expected[name.removesuffix(".scale")].shape[:1]
        if weight.shape != wanted:
            raise ValueError(f"encoder.{name} must have the shape {list(wanted)}; got {list(weight.shape)}")
        if weight.device.type != "cpu":
            raise NotImplementedError(f"the packed encoder runs on the CPU; encoder.{name} is on {weight.device}")
        # Extremes carry NaN along, and need no copy of the weight as isfinite() does.
        if weight.is_floating_point() and not all(extreme.isfinite() for extreme in weight.aminmax()):
            raise ValueError(f"encoder.{name} holds NaN or infinite numbers: the checkpoint is damaged; load another")


class InferenceEncoder(nn.Module):
    """What stands in the place of an `Encoder` that was packed: it saves, loads and trains no weights."""

    precision: Precision

    def check_call(self, x: Tensor) -> None:
        """ValueError for what only an `Encoder` can do."""
        if self.training:
            raise ValueError("this encoder is packed for inference and cannot train: call model.eval()")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "this encoder is packed for inference and passes no gradients on, but its input wants some: call the "
                "model under torch.no_grad() or torch.inference_mode()"
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "this model is packed for inference and no longer has its weights: save it before accelerate(), or write a "
            "packed checkpoint with `longspan quantize`"
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("this model is packed for inference and takes no new weights: load them before accelerate()")

    def extra_repr(self) -> str:
        return f"precision={self.precision!r}"


class PackedEncoder(InferenceEncoder):
    """What `Encoder` computes, for inference on a CPU. It has no parameters, and several threads may call it.

    weights: an `Encoder`'s, by name; a matrix may be int8 beside its scales, `<name>.scale`. They are taken out of the
    dictionary one by one, so that a caller who keeps no others never holds all of them twice.
    """

    def __init__(self, config: EncoderConfig, weights: MutableMapping[str, Tensor], precision: Precision):
        super().__init__()
        check_precision(precision, torch.device("cpu"))
        check_weights(config, weights)
        self.config, self.precision = config, precision
        last = len(config.blocks) - 1
        self.blocks = nn.ModuleList(
            PackedBlock(config, block, _Weights(weights, f"blocks.{number}."), precision, last=number == last)
            for number, block in enumerate(config.blocks)
        )
        self.final_norm = _Weights(weights, "").norm("final_norm", config) if config.norm == "pre" else None
        blocks: list[Any] = [*self.blocks, None]
        for block, following in pairwise(blocks):
            block.join(following, self.final_norm)
        self.eval()

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        global_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """As `Encoder.forward`; padded rows are 0 and cost nothing. x [B, N, C] may have any floating-point dtype.

        backend: "auto", or a name for `attend`, which then gets one sequence after the other.
        Raises ValueError in training mode, for an x that wants gradients, and for one that is not on the CPU.
        """
        return self._states(x, token_mask, global_mask, position_ids, backend, last_only=True)[-1]

    def hidden_states(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        global_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, ...]:
        """x itself and the state after every block; the last one is what `forward` gives (final norm included)."""
        return (x, *self._states(x, token_mask, global_mask, position_ids, backend, last_only=False))

    def first_tokens(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        global_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """What `forward` gives for the first token of each row, [B, C], and 0 for a row without any."""
        self._check(x)
        states = x.new_zeros(len(x), self.config.width)
        blocks: list[Any] = [*self.blocks]
        last = blocks[-1]
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            work = self._begin(x, token_mask, global_mask, position_ids)
            if work is not None:
                sequences, rows = work.batch.first_tokens()
                folds = last.folds(work.batch, rows)
                if len(blocks) > 1 or not folds:
                    self._project(work)
                for block, following in pairwise(blocks):
                    block(work, None if folds and following is last else following, self.final_norm, "auto")
                if folds:
                    last.read_first(work, rows)
                else:
                    last.attend(work, "auto", first_only=True)
                work.keep(rows, last.block)
                last.finish(work, None, self.final_norm)
                states[sequences] = work.stream[: len(rows)].to(states.dtype)
        return states

    def _states(self, x, token_mask, global_mask, position_ids, backend, *, last_only: bool) -> list[Tensor]:
        self._check(x)
        # Made outside of inference mode, so that a head may train on them.
        make = torch.empty_like if token_mask is None else torch.zeros_like
        states = [make(x) for _ in range(1 if last_only else len(self.blocks))]
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            work = self._begin(x, token_mask, global_mask, position_ids)
            if work is None:
                return states
            self._project(work)
            blocks: list[Any] = [*self.blocks, None]
            for number, (block, following) in enumerate(pairwise(blocks)):
                block(work, following, self.final_norm, backend)
                if not last_only or following is None:
                    work.batch.put(work.stream[: work.batch.tokens], states[0 if last_only else number])
        return states

    def _check(self, x: Tensor) -> None:
        self.check_call(x)
        if x.device.type != "cpu":
            raise ValueError(f"this encoder is packed for the CPU; got an input on {x.device}")

    def _begin(self, x, token_mask, global_mask, position_ids) -> Workspace | None:
        """The rows of a call; None where there are no tokens."""
        same_anywhere = all(depends_on_distance_only(block.pattern) for block in self.config.blocks)
        batch = Ragged(x, token_mask, global_mask, from_place_zero=not same_anywhere)
        if not batch.tokens:
            return None
        work = Workspace(self.config, _dtype(self.precision), self.precision == "int8", batch, position_ids)
        batch.take(x, work.stream[: batch.tokens])
        return work

    def _project(self, work: Workspace) -> None:
        """The first layer's queries, keys and values."""
        block: Any = self.blocks[0]
        for chunk in work.chunks:
            block.begin(work, chunk, work.add(chunk, None, block.attention_norm, to_attention=True))


class PackedBlock(nn.Module):
    """One layer of a `PackedEncoder`."""

    def __init__(
        self, config: EncoderConfig, block: BlockConfig, weights: _Weights, precision: Precision, *, last: bool
    ):
        super().__init__()
        self.config, self.block = config, block
        self.qkv_global = None
        if block.global_projections:
            weight, bias = weights.take("attention.qkv_global")
            self.qkv_global = GlobalProjections(block, weight, bias, _dtype(precision))
        weight, bias = weights.take("attention.qkv")
        self.first_reader = None  # of the last layer: what a first token that sees all tokens reads by
        if last and config.norm == "post" and block.rope_theta is None:
            rounded = weight.narrowed() if precision == "int8" else weight  # as in a packed checkpoint
            self.first_reader = self.qkv_global or GlobalProjections(block, rounded, bias, _dtype(precision))
        self.qkv = make_linear(weight, bias, precision)
        self.out = weights.linear("attention.out", precision)
        has_norm = config.norm == "post" or block.attention_norm
        self.attention_norm = weights.norm("attention_norm", config) if has_norm else None
        self.ffn_in = weights.linear("ffn_in", precision, None if config.gated else config.activation)
        self.ffn_out = weights.linear("ffn_out", precision)
        self.ffn_norm = weights.norm("ffn_norm", config)
        self.activation = activation(config.activation)
        # Of the layer after attention, in one call: with the next layer's projection, and without any.
        self.rest: Layer | None = None
        self.rest_alone: Layer | None = None

    def join(self, following: PackedBlock | None, final_norm: Norm | None) -> None:
        """Makes one call of what follows attention, where all of it is computed by our own kernels."""
        if following is not None:
            self.rest = self._in_one_call(following, final_norm)
        if following is None or following.first_reader is not None:
            self.rest_alone = self._in_one_call(None, final_norm)

    def _in_one_call(self, following: PackedBlock | None, final_norm: Norm | None) -> Layer | None:
        first_norm, next_norm = self.attention_norm, self.ffn_norm
        if self.config.norm == "pre":
            first_norm, next_norm = self.ffn_norm, final_norm if following is None else following.attention_norm
        linears = [self.out, self.ffn_in, self.ffn_out, *([] if following is None else [following.qkv])]
        if (
            not all(isinstance(linear, KernelLinear) for linear in linears)
            or self.config.activation not in ACTIVATIONS
            or first_norm is None
            or next_norm is None
        ):
            return None
        out, ffn_in, ffn_out, *qkv = (Dense(one.packed, one.bias, one.activation) for one in linears)  # type: ignore
        return Layer(
            *(out, ffn_in, ffn_out, qkv[0] if qkv else None, first_norm, next_norm),
            pre_norm=self.config.norm == "pre",
            activation=self.config.activation,
            gated=self.config.gated,
        )

    def begin(self, work: Workspace, chunk: slice, x: Any) -> None:
        """Queries, keys and values of a chunk of rows."""
        out, rotary, turn = work.qkv(self.block)[chunk], work.rotary(self.block), None
        if rotary is not None:
            turn = Turn(rotary.cos[0, 0, chunk], rotary.sin[0, 0, chunk], 2 * self.block.heads)
        rows.finish(self.qkv(x, out), out, turn)

    def forward(self, work: Workspace, following: PackedBlock | None, final_norm: Norm | None, backend: str) -> None:
        """The layer, and the beginning of the one that follows."""
        self.attend(work, backend)
        self.finish(work, following, final_norm)

    def finish(self, work: Workspace, following: PackedBlock | None, final_norm: Norm | None) -> None:
        """What follows attention, and the beginning of the next layer."""
        rest = self.rest_alone if following is None else self.rest
        if rest is not None:
            rest(work.layer_rows(rest, self.block, None if following is None else following.block))
            return
        attended, last = work.attended(self.block), following is None
        next_norm = final_norm if following is None else following.attention_norm
        for chunk in work.chunks:
            product = self.out(work.readable(attended[chunk]), work.sum_of(chunk))
            x = work.add(chunk, product, self.ffn_norm if work.pre else self.attention_norm, to_attention=False)
            product = self.feed_forward(work, chunk, x)
            x = work.add(chunk, product, next_norm if work.pre else self.ffn_norm, to_attention=True, last=last)
            if following is not None:
                following.begin(work, chunk, x)

    def feed_forward(self, work: Workspace, chunk: slice, x: Any) -> Product:
        number, width = chunk.stop - chunk.start, self.block.ffn_width
        product = self.ffn_in(x, work.ffn_product(number, 2 * width if self.config.gated else width))
        if self.ffn_in.activates:
            inner = work.readable(product.y)
        else:
            inner = work.inner(number, width)
            rows.activate(product, self.config.activation, self.activation, inner, gated=self.config.gated)
        return self.ffn_out(inner, work.sum_of(chunk))

    def folds(self, batch: Ragged, rows: list[int]) -> bool:
        """Whether `read_first` serves these rows: each sees all tokens of its sequence."""
        if self.first_reader is None:
            return False
        if self.qkv_global is None and self.block.pattern == Full():
            return True
        return batch.marked is not None and bool(batch.marked[rows].all())

    def read_first(self, work: Workspace, rows: list[int]) -> None:
        """What these rows, one of each sequence, read, in work.attended; from the stream, without keys and values."""
        assert self.first_reader is not None
        sequences = ((start, end, seen) for start, end, seen, _ in work.batch.sequences())
        work.attended(self.block)[rows] = self.first_reader.read_first(work.stream, rows, sequences)

    def attend(self, work: Workspace, backend: str, *, first_only: bool = False) -> None:
        """What each row, or the first of each sequence at least, reads from those of its sequence, in work.attended."""
        batch = work.batch
        q, k, v, compute = work.attention(self.block, backend, first_only=first_only)
        compute()
        if batch.marked is None or (self.qkv_global is None and self.block.pattern == Full()):
            return
        rotary = work.rotary(self.block)
        for start, end, seen, marked in batch.sequences():
            if marked is None:
                continue
            if self.qkv_global is None:
                one_q, one_k, one_v = (part[start:end].transpose(0, 1)[None] for part in (q, k, v))  # [1, H, n, D]
                read = attend(one_q[:, :, marked], one_k, one_v, Full(), token_mask=seen, query_positions=marked)
                read = read[0].transpose(0, 1).flatten(1)
            else:
                assert work.layer_input is not None
                turn = None if rotary is None else Rotary(*(part[:, :, start:end] for part in rotary))
                read = self.qkv_global.read(work.layer_input[start:end], marked, seen, turn)
            work.attended(self.block)[start + marked] = read


class _Weights:
    """The weights whose names begin with a prefix, each to be taken once."""

    def __init__(self, weights: MutableMapping[str, Tensor], prefix: str):
        self.weights, self.prefix = weights, prefix

    def take(self, name: str) -> tuple[Weight, Tensor | None]:
        name = self.prefix + name
        weight = Weight(self.weights.pop(f"{name}.weight"), self.weights.pop(f"{name}.weight.scale", None))
        return weight, self.weights.pop(f"{name}.bias", None)

    def linear(self, name: str, precision: Precision, activation: str | None = None) -> Linear:
        return make_linear(*self.take(name), precision, activation)

    def norm(self, name: str, config: EncoderConfig) -> Norm:
        weight, bias = self.take(name)
        wide = (None if part is None else part.to(torch.float32, copy=True) for part in (weight.values, bias))
        return Norm(*wide, config.norm_eps)  # type: ignore[arg-type]


def _dtype(precision: Precision) -> torch.dtype:
    """Of what is not in 8 bits: queries, keys, values, the global projections."""
    return torch.float32 if precision == "fp32" else torch.bfloat16
