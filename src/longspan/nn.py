"""Drop-in modules under the names that people know.

Shapes: B batch, N tokens, C model width, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.attention import DilatedSegments, attend
from longspan.attention.blocks import cut
from longspan.attention.positions import DistanceBuckets, Rotary, turn

__all__ = ["DilatedAttention"]


class DilatedAttention(nn.Module):
    """LongNet's attention with its projections: x [B, N, C] -> [B, N, C], any N.

    d_model, num_heads: C and H. segment_size, dilation_rate: numbers or lists of equal length, the mixture's branches:
        each splits the tokens in segments and keeps every `dilation_rate`-th token of each.
    dropout: fraction of the attention probabilities dropped in training. causal: tokens see only those before them.
    use_xpos: q and k turn by their positions and, where causal, far keys fade; more slowly with a larger scale base.
    use_rel_pos_bias: T5's 32 buckets of distances up to 128, a number for each head added to the scores.
    offsets: which tokens a head keeps: "grouped" as in the released code, "interleaved" as in the paper.
    compatible: "torchscale" computes as the released code does where that is sane: branches mixed by weights without
        gradients, its head offsets where a dilation does not divide the heads, xPos that also fades without `causal`.
        It takes N and segments that divide without rest, and no padding: elsewhere the released code is wrong.
    checkpoint: compute gradients from some segments at a time, each computed once more for them, so that memory holds
        little besides x and the result. Without gradients that is always done. On CPU, for more than 32,768 tokens
        that have no padding, xPos, relative bias or dropout.

    Source: LongNet, arXiv 2307.02486, section 2.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dilation_rate: int | Sequence[int],
        segment_size: int | Sequence[int],
        dropout: float = 0.0,
        causal: bool = False,
        use_xpos: bool = False,
        use_rel_pos_bias: bool = False,
        *,
        offsets: Literal["grouped", "interleaved"] = "grouped",
        compatible: Literal["torchscale"] | None = None,
        xpos_scale_base: float = 512.0,
        checkpoint: bool = False,
    ):
        super().__init__()
        if min(d_model, num_heads) < 1 or d_model % num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads, both at least 1; got {d_model} and {num_heads}")
        if use_xpos and d_model // num_heads % 2:
            raise ValueError(f"use_xpos turns pairs, so d_model / num_heads must be even; got {d_model // num_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is the fraction of probabilities to drop, 0 <= dropout < 1; got {dropout}")
        if compatible not in (None, "torchscale"):
            raise ValueError(f"compatible must be None or 'torchscale'; got {compatible!r}")
        if compatible and (use_rel_pos_bias or offsets != "grouped"):
            raise ValueError("compatible='torchscale' has grouped offsets and no relative bias, as the released code")
        self.pattern = DilatedSegments.mixture(segment_size, dilation_rate, num_heads, causal, offsets)
        self.dropout, self.compatible, self.checkpoint = dropout, compatible, checkpoint
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.rotary = None
        if use_xpos:
            self.rotary = Rotary(d_model // num_heads, decay_base=xpos_scale_base if causal or compatible else None)
        self.buckets = DistanceBuckets(num_heads, causal=causal) if use_rel_pos_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights drawn anew, as the released code draws them."""
        for part in self.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(part, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """x: [B, N, C]. key_padding_mask: Bool[B, N], True at padding, as in torch.nn.MultiheadAttention.

        Padding is never seen and keeps its place: segments count it. What comes out there is `out`'s bias.
        """
        width, heads = self.out.in_features, self.pattern.heads
        if x.ndim != 3 or x.shape[2] != width:
            raise ValueError(f"x must be [B, N, {width}]; got {list(x.shape)}")
        if key_padding_mask is not None and (key_padding_mask.dtype, key_padding_mask.shape) != (
            torch.bool,
            x.shape[:2],
        ):
            raise ValueError(
                f"key_padding_mask must be Bool{list(x.shape[:2])}, True at padding; "
                f"got {key_padding_mask.dtype} {list(key_padding_mask.shape)}"
            )
        if 0 in x.shape:
            return self.out(x)
        dropout = self.dropout if self.training else 0.0
        if key_padding_mask is None and not dropout and self._may_be_cut(x):
            blocks = cut(self.pattern, x.shape[1])
            if len(blocks) > 1:
                from longspan.models.blockwise import attend_in_blocks  # whose package takes transformers' time to load

                weights = self.qkv.weight, self.qkv.bias, self.out.weight, self.out.bias
                return attend_in_blocks(x, *weights, heads, blocks, partial(attend, pattern=self.pattern))
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(2, (3, heads, -1)).unbind(2))  # [B, H, N, D]
        if self.rotary is not None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
            rotation = self.rotary.at(positions, self.rotary.middle(x.shape[1]), x.dtype)
            q, k = turn(q, rotation.q), turn(k, rotation.k)
        if self.compatible:
            seen = self._as_released(q, k, v, key_padding_mask, dropout)
        else:
            token_mask = None if key_padding_mask is None else ~key_padding_mask
            bias = None if self.buckets is None else self.buckets()
            seen = attend(q, k, v, self.pattern, token_mask=token_mask, dropout=dropout, bias=bias)
        return self.out(seen.transpose(1, 2).flatten(2))

    def _may_be_cut(self, x: Tensor) -> bool:
        """Whether some segments at a time give the same, and are asked for."""
        return (
            (self.checkpoint or not torch.is_grad_enabled())
            and self.compatible is self.rotary is self.buckets is None
            and type(self.qkv) is type(self.out) is nn.Linear  # others may do more
            and x.is_cpu
            and x.dtype == self.qkv.weight.dtype
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        )

    def _as_released(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, dropout: float) -> Tensor:
        """torchscale's dilated attention, [B, H, N, D]: branches mixed by their softmax sums, without gradients."""
        heads, tokens = q.shape[1:3]
        if padding is not None and padding.any():
            raise ValueError(
                "compatible='torchscale' takes no padding, because the released code lets padding be seen; "
                "leave compatible out"
            )
        outs, sums = [], []
        for segment, rate in self.pattern.branches:
            length = min(segment, tokens)
            if tokens % length or length % rate:
                raise ValueError(
                    f"compatible='torchscale' needs N to be a multiple of each segment, and segments of their "
                    f"dilations, because the released code is wrong elsewhere; got N={tokens}, segment {length}, "
                    f"dilation {rate}; leave compatible out"
                )
            missing = -heads % rate  # the released code spreads offsets over heads filled up to a multiple of the rate
            more_q, more_k, more_v = (F.pad(rows, (0, 0, 0, 0, 0, missing)) for rows in (q, k, v))
            branch = DilatedSegments(((length, rate),), heads + missing, self.pattern.causal)
            out, lse = attend(more_q, more_k, more_v, branch, dropout=dropout, return_lse=True)
            outs.append(out[:, :heads])
            sums.append(lse[:, :heads].detach())
        total = torch.stack(sums)  # [branches, B, H, N]
        shares = total.masked_fill((total == -math.inf).all(0), 0).softmax(0)[..., None]
        return (torch.stack(outs) * shares.to(q.dtype)).sum(0)

    def extra_repr(self) -> str:
        return repr(self.pattern)
