"""What some tokens read from a whole sequence that lies on several ranks, as Longformer's global tokens do.

Every rank computes what all of these tokens read from its own keys, and the rank of a token merges what it is told.

Shapes: B batch, H heads, n tokens of this rank, G reading tokens of this rank, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longspan.attention import Full
from longspan.attention import attend as attend_here
from longspan.distributed.shards import SequenceShards


def attend_all(
    q: Tensor, k: Tensor, v: Tensor, shards: SequenceShards, *, token_mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """What q [B, H, G, D] read from all keys and values, [B, H, G, D]; all ranks call it together.

    G may be 0, and another number on each rank. k, v: [B, H, n, D]. token_mask: Bool[B, n], on every rank or on none.
    Bytes: of G queries to each other rank, and of their answers back, whatever the length of the sequence.
    """
    batch, heads, asked, width = q.shape
    counts = shards.gather(asked)
    if k.requires_grad and torch.is_grad_enabled() and not q.requires_grad:
        q = q.detach().requires_grad_()  # so that the exchanges have a way back on every rank
    questions = shards.exchange(
        [[q[:, :, :0] if rank == shards.rank else q] for rank in range(shards.size)],
        [[(batch, heads, 0 if rank == shards.rank else count, width)] for rank, count in enumerate(counts)],
    )
    received = [parts[0] for parts in questions.wait()]
    received[shards.rank] = q
    out, lse = _read(torch.cat(received, 2), k, v, token_mask, dropout)
    answers = torch.cat((out.to(lse.dtype), lse[..., None]), -1).split(counts, 2)
    exchange = shards.exchange(
        [[part[:, :, :0] if rank == shards.rank else part] for rank, part in enumerate(answers)],
        [[(batch, heads, 0 if rank == shards.rank else asked, width + 1)] for rank in range(shards.size)],
    )
    found = [parts[0] for parts in exchange.wait()]
    found[shards.rank] = answers[shards.rank]
    every = torch.stack(found)  # [R, B, H, G, D + 1]
    outs, sums = every[..., :width], every[..., width]
    blind = (sums == -torch.inf).all(0)
    shares = sums.masked_fill(blind, 0).softmax(0)
    return (shares[..., None] * outs).sum(0).to(q.dtype)


def _read(q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries over this rank's keys."""
    if not q.shape[2]:
        wide = torch.promote_types(q.dtype, torch.float32)
        return q, q[..., 0].to(wide)
    if token_mask is None:
        stands = torch.zeros(q.shape[2], dtype=torch.long, device=q.device)
    else:  # `attend` answers no query that stands on padding, so each stands on the first token of its row, if any
        stands = token_mask.long().argmax(1, keepdim=True).expand(-1, q.shape[2])
    return attend_here(q, k, v, Full(), token_mask=token_mask, query_positions=stands, dropout=dropout, return_lse=True)
