"""An encoder's attention in operators that ONNX has, with every shape read from the input when the graph runs.

A sliding window is computed block by block against neighbouring blocks of keys, so its cost grows linearly with N.

Shapes: B batch, H heads, N tokens, D head width, C model width, G global tokens of the row that has most (at least 1).
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.attention import Full, Pattern, SlidingWindow
from longspan.models.encoder import Attention, Block, BlockConfig, Encoder, Rotary

BLOCK = 128  # longest block of queries: of 64, 128 and 256 the quickest with a window of 512 and 4,096 tokens
HIDDEN = -1e30  # swallows any fp32 score: its exponential is 0, and a row that sees nothing is not NaN


class GlobalTokens(NamedTuple):
    """mask: Bool[B, N]. rows: Long[B, G], where they stand, padded with 0. valid: Bool[B, G], False at that padding.
    slot: Long[B, N], which column of `rows` a global token has."""

    mask: Tensor
    rows: Tensor
    valid: Tensor
    slot: Tensor

    @classmethod
    def find(cls, mask: Tensor) -> GlobalTokens:
        batch, tokens = mask.shape
        place = torch.arange(tokens, device=mask.device).expand(batch, -1)
        running = mask.long().cumsum(1)
        counts = running[:, -1:]  # [B, 1]
        # [G], 0 up to G - 1. A shape stays a variable of the graph, where a number read from the data would be frozen.
        columns = (place[0] < counts.max().clamp(min=1)).nonzero()[:, 0]
        most = columns.shape[0]
        slot = torch.where(mask, running - 1, most)  # tokens that are not global share a column that is cut off
        rows = torch.zeros(batch, most + 1, dtype=torch.long, device=mask.device).scatter(1, slot, place)[:, :most]
        return cls(mask, rows, columns < counts, torch.where(mask, slot, 0))


class OnnxEncoder(nn.Module):
    """What `Encoder` computes, for torch.export: the encoder's own modules with attention that has no loop over data.

    Raises NotImplementedError for a layer that sees by another pattern than Full() and SlidingWindow.
    """

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.config = encoder.config
        self.blocks, self.final_norm = encoder.blocks, encoder.final_norm
        for number, block in enumerate(encoder.blocks):
            block.attention = OnnxAttention(cast(Attention, cast(Block, block).attention), number)
        self.has_globals = any(uses_global_tokens(block) for block in self.config.blocks)

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor,
        global_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """As `Encoder.forward`; the padded rows hold other numbers, which reach nothing."""
        global_tokens = None
        if global_mask is not None and self.has_globals:
            global_tokens = GlobalTokens.find(global_mask & token_mask)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        for described, block in zip(self.config.blocks, self.blocks, strict=True):
            rotary = None
            if described.rope_theta is not None:
                rotary = Rotary.at(position_ids, described.head_width, described.rope_theta, x.dtype)
            x = block(x, token_mask, global_tokens, rotary, backend)
        return self.final_norm(x)


class OnnxAttention(nn.Module):
    """`Attention` of one layer."""

    def __init__(self, attention: Attention, layer: int):
        super().__init__()
        self.block, self.split = attention.block, attention.split
        self.qkv, self.qkv_global, self.out = attention.qkv, attention.qkv_global, attention.out
        pattern = self.block.pattern
        if pattern != Full() and not _is_window(pattern):
            raise NotImplementedError(
                f"layer {layer} sees by {pattern!r}, which has no ONNX graph; a layer can be exported with Full() or a "
                f"SlidingWindow that has one dilation for all heads"
            )

    def forward(
        self, x: Tensor, token_mask: Tensor, global_tokens: GlobalTokens | None, rotary: Rotary | None, backend: str
    ) -> Tensor:
        q, k, v = self.split(self.qkv(x))  # [B, H, N, D]
        if rotary is not None:
            q, k = rotary.turn(q), rotary.turn(k)
        pattern = self.block.pattern
        if isinstance(pattern, SlidingWindow):
            seen = attend_window(q, k, v, pattern, token_mask, global_tokens)
        else:
            seen = attend_all(q, k, v, token_mask)
        seen = seen.transpose(1, 2).flatten(2)  # [B, N, H*D]
        if global_tokens is not None and uses_global_tokens(self.block):
            everything = self.see_everything(x, q, k, v, token_mask, global_tokens, rotary)  # [B, G, H*D]
            everything = everything.gather(1, global_tokens.slot[..., None].expand(-1, -1, seen.shape[2]))
            seen = torch.where(global_tokens.mask[..., None], everything, seen)
        return self.out(seen)

    def see_everything(self, x, q, k, v, token_mask, global_tokens: GlobalTokens, rotary: Rotary | None) -> Tensor:
        """What the global tokens read from the whole row, [B, G, H*D]."""
        rows = global_tokens.rows
        if self.qkv_global is None:
            out = attend_all(_take_rows(q, rows), k, v, token_mask)
        else:
            inner = self.out.in_features
            weight, bias = self.qkv_global.weight, self.qkv_global.bias
            x_global = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))  # [B, G, C]
            (q,) = self.split(F.linear(x_global, weight[:inner], None if bias is None else bias[:inner]))
            if rotary is None:
                out = self._read_folded(x, q, token_mask)
            else:
                k, v = self.split(F.linear(x, weight[inner:], None if bias is None else bias[inner:]))
                parts = (part.expand(rows.shape[0], -1, -1, -1) for part in rotary)
                at_rows = Rotary(*(_take_rows(part, rows) for part in parts))
                out = attend_all(at_rows.turn(q), rotary.turn(k), v, token_mask)
        return out.transpose(1, 2).flatten(2)

    def _read_folded(self, x: Tensor, q: Tensor, token_mask: Tensor) -> Tensor:
        """[B, H, G, D] without projecting all N tokens, so that a batch without global tokens costs next to nothing:
        a score is (Wk^T q) . x, the key's bias leaves the softmax, the mean of Wv x + b is Wv (mean of x) + b."""
        assert self.qkv_global is not None
        heads, width = self.block.heads, self.block.head_width
        _, key, value = self.qkv_global.weight.view(3, heads, width, -1).unbind()  # [H, D, C]
        folded = q.matmul(key)  # [B, H, G, C]
        x = x[:, None]  # [B, 1, N, C]
        mixed = _weigh(folded.matmul(x.transpose(2, 3)) * width**-0.5, token_mask[:, None, None]).matmul(x)
        out = mixed.matmul(value.transpose(1, 2))
        bias = self.qkv_global.bias
        return out if bias is None else out + bias.view(3, heads, 1, width)[2]


def uses_global_tokens(block: BlockConfig) -> bool:
    """Whether a global token changes anything in this layer."""
    return block.global_projections or block.pattern != Full()


def attend_all(q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor) -> Tensor:
    """q [B, H, M, D] over all tokens of k, v [B, H, N, D]."""
    scores = (q * q.shape[3] ** -0.5).matmul(k.transpose(2, 3))
    return _weigh(scores, token_mask[:, None, None]).matmul(v)


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, window: SlidingWindow, token_mask: Tensor, global_tokens: GlobalTokens | None
) -> Tensor:
    """q, k, v [B, H, N, D] -> [B, H, N, D]: each token over its window and the global tokens, each key once.

    N is filled up to whole blocks of c queries; a block sees itself and the blocks that its window touches. Dilation d
    makes d streams of every d-th token, each with a window of its own.
    """
    batch, heads, tokens, width = q.shape
    before, after, streams = window.before, window.after, _dilation(window)
    block = min(max(before, after, 1), BLOCK)
    left, right = -(-before // block), -(-after // block)  # blocks before and after its own
    blocks = (tokens + block * streams - 1) // (block * streams)  # n
    length = blocks * block * streams

    def in_streams(x: Tensor) -> Tensor:  # [.., N, d] -> [.., streams, n*c, d]
        x = F.pad(x, (0, 0, 0, length - tokens))
        return x.reshape(*x.shape[:-2], blocks * block, streams, x.shape[-1]).transpose(-2, -3)

    def neighbors(x: Tensor) -> Tensor:  # [.., N, d] -> [.., streams * n, (left + 1 + right) * c, d]
        x = F.pad(in_streams(x), (0, 0, left * block, right * block))
        x = x.reshape(*x.shape[:-2], left + blocks + right, block, x.shape[-1])
        x = torch.cat([x[..., shift : shift + blocks, :, :] for shift in range(left + 1 + right)], -2)
        return x.flatten(-4, -3)

    q = in_streams(q * width**-0.5).reshape(batch, heads, streams * blocks, block, width)
    scores = q.matmul(neighbors(k).transpose(3, 4))  # [B, H, n, c, keys]
    offset = torch.arange(-left * block, (right + 1) * block) - torch.arange(block)[:, None]
    in_window = (offset >= -before) & (offset <= after)  # [c, keys], the same in all blocks
    is_local = token_mask if global_tokens is None else token_mask & ~global_tokens.mask
    visible = in_window & neighbors(is_local[:, None, :, None].int()).transpose(3, 4).bool()
    scores = scores + _penalty(visible)
    v_local = neighbors(v)
    if global_tokens is None:
        out = scores.softmax(-1).matmul(v_local)
    else:
        k_global, v_global = _take_rows(k, global_tokens.rows), _take_rows(v, global_tokens.rows)  # [B, H, G, D]
        extra = q.flatten(2, 3).matmul(k_global.transpose(2, 3)).unflatten(2, (streams * blocks, block))
        extra = extra + _penalty(global_tokens.valid[:, None, None, None])  # [B, H, n, c, G]
        weights = torch.cat((scores, extra), -1).softmax(-1)
        keys = scores.shape[-1]
        out = weights[..., :keys].matmul(v_local)
        out = out + weights[..., keys:].flatten(2, 3).matmul(v_global).unflatten(2, (streams * blocks, block))
    out = out.reshape(batch, heads, streams, blocks * block, width).transpose(2, 3)
    return out.reshape(batch, heads, length, width)[:, :, :tokens]


def _weigh(scores: Tensor, visible: Tensor) -> Tensor:
    return (scores + _penalty(visible)).softmax(-1)


def _penalty(visible: Tensor) -> Tensor:
    """What is added to scores, 0 or HIDDEN: ONNX Runtime adds several times as fast as it selects."""
    return torch.where(visible, 0.0, HIDDEN)


def _take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, H, N, D] at rows [B, G] -> [B, H, G, D]."""
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _is_window(pattern: Pattern) -> bool:
    return isinstance(pattern, SlidingWindow) and (isinstance(pattern.dilation, int) or len(set(pattern.dilation)) == 1)


def _dilation(window: SlidingWindow) -> int:
    return window.dilation if isinstance(window.dilation, int) else window.dilation[0]
