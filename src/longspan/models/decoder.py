"""One stack of self-attention layers for language models and LongNet encoders: x [B, N, C] -> x [B, N, C].

A family (the Longformer language model, LongNet) is a description, `DecoderConfig`, and never a subclass.

Shapes: B batch, N tokens, C model width, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.attention import DistanceBias, Pattern
from longspan.attention.positions import DistanceBuckets, RelativeSinusoids, Rotary, Rotation
from longspan.attention.positions import turn as turn_pairs
from longspan.models.decoder_cache import DecoderCache, attend_cached
from longspan.models.encoder import activation
from longspan.models.sequence import Place, WholeSequence
from longspan.models.trained_linear import TrainedLinear

Positions = Literal["xpos", "rotary", "relative", "bucketed", "none"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A whole stack: its sizes, what each layer sees from bottom to top, and what the layers have in common.

    patterns: one per layer. Where none of them looks ahead, the stack is causal.
    positions: "xpos" turns q and k by their positions and lets far keys fade, "rotary" turns only, "relative" is
        Transformer-XL's sinusoids, "bucketed" is T5's bias by distance, "none". A stack that is not causal has no
        direction to fade in: there "xpos" is "rotary".
    xpos_scale_base: tokens over which the fastest pair fades to 0.29, the slowest hardly. relative_width: sinusoids.
    subln: norms also before both output projections (Magneto, arXiv 2210.06423, section 2).
    deepnorm: norms after residual sums in which the input weighs more (DeepNet, arXiv 2203.00555, section 3).
    dropout: after embeddings and sublayers. attention_dropout: of the probabilities; longspan's fastest kernels
        have none. ffn_inner_dropout: before the feed-forward's second projection.
    """

    width: int
    heads: int
    ffn_width: int
    patterns: tuple[Pattern, ...]
    positions: Positions = "xpos"
    xpos_scale_base: float = 512.0
    relative_width: int = 64
    relative_buckets: int = 32
    relative_max_distance: int = 128
    subln: bool = False
    deepnorm: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    ffn_inner_dropout: float = 0.0

    def __post_init__(self):
        if min(self.width, self.heads, self.ffn_width) < 1 or self.width % self.heads:
            raise ValueError(
                f"the hidden size must be a multiple of the number of heads, and all sizes at least 1; "
                f"got hidden size {self.width}, {self.heads} heads, feed-forward size {self.ffn_width}"
            )
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions must be one of {', '.join(get_args(Positions))}; got {self.positions!r}")
        turned = {"xpos": self.head_width, "rotary": self.head_width, "relative": self.relative_width}
        if turned.get(self.positions, 2) % 2 or self.relative_width < 2:
            raise ValueError(
                f"positions={self.positions!r} turns pairs of numbers, so the head width (hidden size / heads) and "
                f"relative_width must be even; got {self.head_width} and {self.relative_width}"
            )
        if self.xpos_scale_base <= 0:
            raise ValueError(f"xpos_scale_base is a number of tokens above 0; got {self.xpos_scale_base}")
        if self.subln and self.deepnorm:
            raise ValueError(
                "subln=True puts norms before the sublayers and deepnorm=True after them; choose one of them"
            )
        for name in ("dropout", "attention_dropout", "ffn_inner_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is the fraction to drop, 0 <= {name} < 1; got {getattr(self, name)}")
        activation(self.activation)
        object.__setattr__(self, "patterns", tuple(self.patterns))

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def causal(self) -> bool:
        return not any(pattern.looks_ahead() for pattern in self.patterns)

    @property
    def rotary(self) -> Rotary | None:
        """What turns pairs of numbers by their positions, if anything."""
        if self.positions == "relative":
            return Rotary(self.relative_width)
        if self.positions in ("xpos", "rotary"):
            decays = self.positions == "xpos" and self.causal
            return Rotary(self.head_width, decay_base=self.xpos_scale_base if decays else None)
        return None

    @property
    def residual_scale(self) -> float:
        """What each layer multiplies its input by in the residual sums: DeepNet's alpha."""
        return (2 * len(self.patterns)) ** 0.25 if self.deepnorm else 1.0

    @property
    def output_gain(self) -> float | None:
        """What v's, the output and the feed-forward weights start multiplied by; None: no scheme asks for it."""
        if self.subln:
            return math.sqrt(math.log(2 * len(self.patterns)))  # Magneto's gamma
        return (8 * len(self.patterns)) ** -0.25 if self.deepnorm else None  # DeepNet's beta


class Pass(NamedTuple):
    """What all layers share in one pass.

    positions: Long[B, N], counted by tokens, -1 at padding; needed beside a cache only. starts: whether these are the
    first tokens.
    """

    place: Place
    rotation: Rotation | None
    bias: DistanceBias | None
    cache: DecoderCache | None
    positions: Tensor | None
    starts: bool


class Attention(nn.Module):
    """Multi-head self-attention under a pattern, with a cache or without."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv = TrainedLinear(config.width, 3 * config.width)
        self.relative = None
        if config.positions == "relative":
            self.relative = RelativeSinusoids(config.heads, config.head_width, config.relative_width)
        self.inner_norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.subln else nn.Identity()
        self.out = TrainedLinear(config.width, config.width)

    def forward(self, x: Tensor, pattern: Pattern, now: Pass) -> Tensor:
        shape = (*x.shape[:2], 3, self.config.heads, -1)
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).view(shape).unbind(2))  # [B, H, N, D]
        if self.relative is not None:
            assert now.rotation is not None
            q, k, v = self.relative(q, k, v, now.rotation)
        elif now.rotation is not None:
            q, k = turn_pairs(q, now.rotation.q), turn_pairs(k, now.rotation.k)
        options = {
            "scale": self.config.head_width**-0.5,
            "dropout": self.config.attention_dropout if self.training else 0.0,
            "bias": now.bias,
        }
        kept = None
        if now.cache is not None:
            assert now.positions is not None
            kept = now.cache.update(k, v, self.layer, now.positions)
        if kept is None or now.starts:
            seen = now.place.attend(q, k, v, pattern, **options)
        else:
            seen = attend_cached(q, *kept, pattern, **options)
        seen = seen[..., : self.config.head_width].transpose(1, 2).flatten(2)  # [B, N, C]
        return self.out(self.inner_norm(seen))


class Block(nn.Module):
    """One layer: attention and feed-forward, each with its residual sum and norm."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.config = config
        self.attention = Attention(config, layer)
        self.attention_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.ffn_in = TrainedLinear(config.width, config.ffn_width)
        self.inner_norm = nn.LayerNorm(config.ffn_width, eps=config.norm_eps) if config.subln else nn.Identity()
        self.ffn_out = TrainedLinear(config.ffn_width, config.width)
        self.ffn_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.drop, self.inner_drop = nn.Dropout(config.dropout), nn.Dropout(config.ffn_inner_dropout)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor, pattern: Pattern, now: Pass) -> Tensor:
        if self.config.deepnorm:
            x = self.attention_norm(x * self.config.residual_scale + self.drop(self.attention(x, pattern, now)))
            return self.ffn_norm(x * self.config.residual_scale + self.drop(self.feed_forward(x)))
        x = x + self.drop(self.attention(self.attention_norm(x), pattern, now))
        return x + self.drop(self.feed_forward(self.ffn_norm(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn_out(self.inner_norm(self.inner_drop(self.activation(self.ffn_in(x)))))


class Decoder(nn.Module):
    """The layers of a `DecoderConfig`, from bottom to top. Other `patterns` may be set: no weight depends on them."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config, self.patterns = config, config.patterns
        self.sequence = WholeSequence()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(len(config.patterns)))
        self.buckets = None
        if config.positions == "bucketed":
            buckets, distance = config.relative_buckets, config.relative_max_distance
            self.buckets = DistanceBuckets(config.heads, buckets, distance, config.causal)
        self.final_norm = nn.Identity() if config.deepnorm else nn.LayerNorm(config.width, eps=config.norm_eps)
        self.gradient_checkpointing = False  # a PreTrainedModel around it turns it on and sets the function below
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, cache: DecoderCache | None = None) -> Tensor:
        """x [B, N, C] after all layers.

        token_mask: Bool[B, N], True = token. Padding may stand anywhere: a row is computed as if it had none, and what
        comes out at padding is of no use. cache: of the tokens before these, and now of these, too.
        """
        x, now, order = self._begin(x, token_mask, cache)
        for state in self._states(x, now):  # no two are kept at a time
            x = state
        return x if order is None else _take(x, order.argsort(1))

    def hidden_states(
        self, x: Tensor, token_mask: Tensor | None = None, cache: DecoderCache | None = None
    ) -> tuple[Tensor, ...]:
        """x itself and the state after every layer; the last one is what `forward` gives (final norm included)."""
        x, now, order = self._begin(x, token_mask, cache)
        states = (x, *self._states(x, now))
        if order is None:
            return states
        back = order.argsort(1)
        return tuple(_take(state, back) for state in states)

    def _begin(
        self, x: Tensor, token_mask: Tensor | None, cache: DecoderCache | None
    ) -> tuple[Tensor, Pass, Tensor | None]:
        """x with its tokens before its padding, what its layers share, and the order Long[B, N], None: as it was."""
        order = None
        place = self.sequence.place(x, token_mask)
        starts = cache is None or not cache.get_seq_length()
        if cache is not None and cache.patterns != self.patterns:
            raise ValueError(
                "past_key_values was made for other patterns, such as windows before set_windows(), and may lack what "
                "these see; begin with an empty one"
            )
        if starts and not place.tokens_first():
            assert place.token_mask is not None
            order = place.token_mask.logical_not().sort(dim=1, stable=True).indices  # as the patterns count them
            x = _take(x, order)
            place.token_mask = place.token_mask.gather(1, order)
        return x, self._describe(x, place, cache, starts), order

    def _describe(self, x: Tensor, place: Place, cache: DecoderCache | None, starts: bool) -> Pass:
        batch, tokens = x.shape[:2]
        positions = torch.arange(place.start, place.start + tokens, device=x.device)[None]
        bias = None if self.buckets is None else self.buckets()
        rotation, rotary = None, self.config.rotary
        if cache is not None:
            positions = cache.positions_of(batch, tokens, place.token_mask, x.device)
        if rotary is not None:
            origin = rotary.middle(place.total) if cache is None else cache.place_origin(tokens, rotary)
            rotation = rotary.at(positions.clamp(min=0), origin, x.dtype)
        return Pass(place, rotation, bias, cache, positions if cache is not None else None, starts)

    def _states(self, x: Tensor, now: Pass) -> Iterator[Tensor]:
        for number, (block, pattern) in enumerate(zip(self.blocks, self.patterns, strict=True), 1):
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block, x, pattern, now)
            else:
                x = block(x, pattern, now)
            yield self.final_norm(x) if number == len(self.blocks) else x
        if now.cache is not None:
            now.cache.tokens += x.shape[1]


def _take(x: Tensor, order: Tensor) -> Tensor:
    """The rows of x [B, N, C] in the order Long[B, N]."""
    return x.gather(1, order[..., None].expand_as(x))
