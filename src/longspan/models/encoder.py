"""One transformer encoder for every family: x [B, N, C] -> x [B, N, C].

A family (BERT, RoBERTa, DistilBERT, Longformer, ModernBERT) is a description, `EncoderConfig`, and never a subclass.
Embeddings come before it (`embeddings.py`) and heads after it (`heads.py`).

Shapes: B batch, N tokens, C model width, H heads, D head width, F feed-forward width, G global tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.attention import Full, GlobalKeys, Pattern, pattern_from_dict
from longspan.models.sequence import Place, WholeSequence
from longspan.models.trained_linear import TrainedLinear, linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function behind a checkpoint's activation name; ValueError when it is not one of ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; expected one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One layer. `heads * head_width` need not equal the model width, so pruned layers are described as they are.

    pattern: what a token may see; the global tokens of a batch are added to it in `forward`.
    global_projections: rows of global tokens use q, k, v projections of their own (Longformer).
    rope_theta: base of the rotary positions, None for none (RoFormer, arXiv 2104.09864, section 3.2.2).
    attention_norm: False leaves out a pre-norm block's first norm, as ModernBERT does in its first layer.
    """

    heads: int
    head_width: int
    ffn_width: int
    pattern: Pattern = field(default_factory=Full)
    global_projections: bool = False
    rope_theta: float | None = None
    attention_norm: bool = True

    def __post_init__(self):
        for name in ("heads", "head_width", "ffn_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.rope_theta is not None and self.head_width % 2:
            raise ValueError(f"rotary positions turn pairs of numbers: head_width must be even; got {self.head_width}")

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | {"pattern": self.pattern.to_dict()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> BlockConfig:
        return cls(**dict[str, Any](fields, pattern=pattern_from_dict(fields["pattern"])))


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A whole encoder: its width, its blocks from bottom to top, and what the blocks have in common.

    norm: "post" normalizes after each residual sum (BERT), "pre" before each sublayer and once at the end (ModernBERT).
    gated: the feed-forward's first projection gives [input, gate] and the second reads act(input) * gate.
    dropout: after each sublayer; attention_out_dropout replaces it after attention (None: it does not).
    attention_dropout: of the attention probabilities. ffn_inner_dropout: before the feed-forward's second projection.
    """

    width: int
    blocks: tuple[BlockConfig, ...]
    norm: Literal["post", "pre"] = "post"
    norm_eps: float = 1e-12
    norm_bias: bool = True
    attention_bias: bool = True
    ffn_bias: bool = True
    activation: str = "gelu"
    gated: bool = False
    dropout: float = 0.0
    attention_out_dropout: float | None = None
    attention_dropout: float = 0.0
    ffn_inner_dropout: float = 0.0

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}")
        if self.norm not in ("post", "pre"):
            raise ValueError(f"norm must be 'post' or 'pre'; got {self.norm!r}")
        activation(self.activation)
        object.__setattr__(self, "blocks", tuple(self.blocks))

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(replace(self, blocks=()))
        return fields | {"blocks": [block.to_dict() for block in self.blocks]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> EncoderConfig:
        return cls(**dict[str, Any](fields, blocks=tuple(BlockConfig.from_dict(block) for block in fields["blocks"])))


class GlobalRows(NamedTuple):
    """The global tokens of a batch, found once for all layers. mask: Bool[B, N]. rows: Long[B, G], padded with 0.
    valid: Bool[B, G], False at the padding. batch, token: Long[T], every global token of the batch in order."""

    mask: Tensor
    rows: Tensor
    valid: Tensor
    batch: Tensor
    token: Tensor

    @classmethod
    def find(cls, x: Tensor, mask: Tensor | None, place: Place) -> GlobalRows | None:
        """Those of x [B, N, C]; none where other ranks have some; None where the whole sequence has none."""
        if not place.anywhere(mask is not None):
            return None
        mask = x.new_zeros(x.shape[:2], dtype=torch.bool) if mask is None else mask
        mask = mask if place.token_mask is None else mask & place.token_mask
        batch, token = mask.nonzero(as_tuple=True)
        if not place.anywhere(bool(len(batch))):
            return None
        counts = mask.sum(1)
        valid = torch.arange(int(counts.max()), device=mask.device) < counts[:, None]  # [B, G]
        rows = torch.zeros_like(valid, dtype=torch.long).masked_scatter(valid, token)
        return cls(mask, rows, valid, batch, token)


class Rotary(NamedTuple):
    """Cosines and sines of the rotary positions, [B or 1, 1, N, D]."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_width: int, theta: float, dtype: torch.dtype) -> Rotary:
        steps = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device)
        # Hugging Face's very roundings: at position 8,192 another order would turn by 1e-3 radians more or less.
        angles = positions[..., None].float() * (1.0 / (theta ** (steps / head_width)))
        angles = torch.cat((angles, angles), -1)[:, None].to(torch.promote_types(dtype, torch.float32))
        return cls(angles.cos(), angles.sin())

    def take(self, rows: Tensor) -> Rotary:  # rows [B, G]
        return Rotary(*(_take_rows(part.expand(len(rows), -1, -1, -1), rows) for part in self))

    def turn(self, x: Tensor) -> Tensor:  # x [B, H, N, D]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        first, second = wide.chunk(2, -1)
        return (wide * self.cos + torch.cat((-second, first), -1) * self.sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention under a pattern, with Longformer's global rows (arXiv 2004.05150, section 3.1)."""

    def __init__(self, config: EncoderConfig, block: BlockConfig):
        super().__init__()
        self.block, self.dropout = block, config.attention_dropout
        inner = block.heads * block.head_width
        self.qkv = TrainedLinear(config.width, 3 * inner, bias=config.attention_bias)
        self.qkv_global = (
            TrainedLinear(config.width, 3 * inner, bias=config.attention_bias) if block.global_projections else None
        )
        self.out = TrainedLinear(inner, config.width, bias=config.attention_bias)

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """[B, N, parts*H*D] -> `parts` views [B, H, N, D]."""
        heads, width = self.block.heads, self.block.head_width
        shape = (*projected.shape[:2], projected.shape[2] // (heads * width), heads, width)
        return tuple(part.transpose(1, 2) for part in projected.view(shape).unbind(2))

    def forward(
        self, x: Tensor, place: Place, global_rows: GlobalRows | None, rotary: Rotary | None, backend: str
    ) -> Tensor:
        q, k, v = self.split(self.qkv(x))  # [B, H, N, D]
        if rotary is not None:
            q, k = rotary.turn(q), rotary.turn(k)
        pattern = self.block.pattern
        reaches_all = pattern == Full()
        if global_rows is not None and not reaches_all:
            pattern = pattern | GlobalKeys(global_rows.mask)
        dropout = self.dropout if self.training else 0.0
        seen = place.attend(q, k, v, pattern, dropout=dropout, backend=backend)
        seen = seen.transpose(1, 2).flatten(2)  # [B, N, H*D]
        if global_rows is not None and (self.qkv_global is not None or not reaches_all):
            everything = self.see_everything(x, q, k, v, place, global_rows, rotary, dropout)
            seen = seen.index_put((global_rows.batch, global_rows.token), everything)
        return self.out(seen)

    def see_everything(self, x, q, k, v, place: Place, global_rows: GlobalRows, rotary, dropout) -> Tensor:
        """What the global tokens read from the whole row, [T, H*D]; only their G rows are computed."""
        rows = global_rows.rows
        if self.qkv_global is None:
            q = _take_rows(q, rows)  # [B, H, G, D]
        else:
            inner = self.out.in_features
            weight, bias = self.qkv_global.weight, self.qkv_global.bias
            x_global = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))  # [B, G, C]
            (q,) = self.split(linear(x_global, weight[:inner], None if bias is None else bias[:inner]))
            k, v = self.split(linear(x, weight[inner:], None if bias is None else bias[inner:]))
            if rotary is not None:
                k = rotary.turn(k)
                q = rotary.take(rows).turn(q)
        out = place.attend_all(q, k, v, rows, dropout=dropout)
        return out.transpose(1, 2).flatten(2)[global_rows.valid]


class Block(nn.Module):
    """One layer: attention and feed-forward, each with its residual sum and norm."""

    def __init__(self, config: EncoderConfig, block: BlockConfig):
        super().__init__()
        self.config, self.block = config, block
        self.attention = Attention(config, block)
        self.attention_norm = _norm(config) if config.norm == "post" or block.attention_norm else nn.Identity()
        self.ffn_in = TrainedLinear(config.width, block.ffn_width * (2 if config.gated else 1), bias=config.ffn_bias)
        self.ffn_out = TrainedLinear(block.ffn_width, config.width, bias=config.ffn_bias)
        self.ffn_norm = _norm(config)
        after_attention = config.dropout if config.attention_out_dropout is None else config.attention_out_dropout
        self.attention_drop, self.ffn_drop = nn.Dropout(after_attention), nn.Dropout(config.dropout)
        self.inner_drop = nn.Dropout(config.ffn_inner_dropout)
        self.activation = activation(config.activation)

    def forward(
        self, x: Tensor, place: Place, global_rows: GlobalRows | None, rotary: Rotary | None, backend: str
    ) -> Tensor:
        if self.config.norm == "post":
            x = self.attention_norm(x + self.attention_drop(self.attention(x, place, global_rows, rotary, backend)))
            return self.ffn_norm(x + self.ffn_drop(self.feed_forward(x)))
        x = x + self.attention_drop(self.attention(self.attention_norm(x), place, global_rows, rotary, backend))
        return x + self.ffn_drop(self.feed_forward(self.ffn_norm(x)))

    def feed_forward(self, x: Tensor) -> Tensor:
        inner = self.ffn_in(x)
        if not self.config.gated:
            return self.ffn_out(self.inner_drop(self.activation(inner)))
        value, gate = inner.chunk(2, -1)
        return self.ffn_out(self.inner_drop(self.activation(value) * gate))


class Encoder(nn.Module):
    """The blocks of an `EncoderConfig`, from bottom to top."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.sequence = WholeSequence()
        self.blocks = nn.ModuleList(Block(config, block) for block in config.blocks)
        self.final_norm = _norm(config) if config.norm == "pre" else nn.Identity()
        self.gradient_checkpointing = False  # a PreTrainedModel around it turns it on and sets the function below
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        global_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """x [B, N, C] after all blocks.

        token_mask: Bool[B, N], True = token; padding is never seen. global_mask: Bool[B, N], True = sees and is seen by
        every token; padded tokens are never global. position_ids: Long[B or 1, N], read by rotary blocks only.
        backend: a name for `attend`; global rows always choose their own.
        """
        for state in self._states(x, token_mask, global_mask, position_ids, backend):
            x = state
        return x

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
        return (x, *self._states(x, token_mask, global_mask, position_ids, backend))

    def _states(self, x, token_mask, global_mask, position_ids, backend) -> Iterator[Tensor]:
        place = self.sequence.place(x, token_mask)
        global_rows = GlobalRows.find(x, global_mask, place)
        if position_ids is None:
            position_ids = torch.arange(place.start, place.start + x.shape[1], device=x.device)[None]
        rotaries: dict[tuple[int, float | None], Rotary] = {}
        for number, (described, block) in enumerate(zip(self.config.blocks, self.blocks, strict=True), 1):
            width, theta = described.head_width, described.rope_theta
            if theta is not None and (width, theta) not in rotaries:
                rotaries[width, theta] = Rotary.at(position_ids, width, theta, x.dtype)
            inputs = (x, place, global_rows, rotaries.get((width, theta)), backend)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block, *inputs)
            else:
                x = block(*inputs)
            yield self.final_norm(x) if number == len(self.blocks) else x


def _take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, H, N, D] at rows [B, G] -> [B, H, G, D]."""
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _norm(config: EncoderConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.norm_bias)
