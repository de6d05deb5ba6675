"""Models whose sequence lies on several ranks.

Shapes: B batch, H heads, n tokens of this rank, C model width, D head width, G global tokens of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longspan.attention import Pattern
from longspan.distributed.attention import attend
from longspan.distributed.global_rows import attend_all
from longspan.distributed.shards import SequenceShards
from longspan.models.decoder import Decoder
from longspan.models.embeddings import Embeddings
from longspan.models.encoder import Encoder
from longspan.models.heads import LongspanForMaskedLM, LongspanForTokenClassification
from longspan.models.model import LongspanModel
from longspan.models.sequence import Place, WholeSequence


def shard(model: nn.Module, group: dist.ProcessGroup | DeviceMesh | None = None) -> None:
    """From now on the tokens that `model` is given are this rank's part of sequences that lie on a group's ranks.

    model: a language model of ours, a `LongspanModel` without pooler, LongspanForMaskedLM or
    LongspanForTokenClassification, or a `Decoder` or `Encoder` alone. Its forward is called on all ranks together,
    each with the same number of rows and any number of tokens, one at least; rank after rank they make the sequence.
    What comes out is this rank's part of one process's output, the loss is that of the whole sequence, on every rank,
    and the gradients of weights add up over the ranks to those of one process. (DistributedDataParallel takes their
    mean: multiply the loss by the number of ranks in a group.) Dropout draws from each rank's own generator: seed the
    ranks differently.
    group: as in `SequenceShards`. None for all processes.
    Raises RuntimeError where torch.distributed was not started, NotImplementedError for a model whose head reads some
    tokens of the sequence only, or without layers of ours.
    """
    parts = _parts(model)
    reads_all = isinstance(model, LongspanForMaskedLM | LongspanForTokenClassification) or (
        isinstance(model, LongspanModel) and model.pooler is None
    )
    if not parts or (any(isinstance(part, Embeddings) for part in parts) and not reads_all):
        raise NotImplementedError(
            f"{type(model).__name__} cannot be sharded along its sequences; there is LongformerForCausalLM, "
            f"LongNetForCausalLM and their base models, LongspanForMaskedLM, LongspanForTokenClassification, "
            f"LongspanModel with add_pooling_layer=False, and the Encoder alone"
        )
    sequence = ShardedSequence(group)
    for part in parts:
        part.sequence = sequence


def unshard(model: nn.Module) -> None:
    """From now on the tokens that `model` is given are whole sequences again."""
    for part in _parts(model):
        part.sequence = WholeSequence()


def _parts(model: nn.Module) -> list[Decoder | Encoder | Embeddings]:
    """Those that ask about the sequence."""
    return [part for part in model.modules() if isinstance(part, Decoder | Encoder | Embeddings)]


class ShardedSequence(WholeSequence):
    """The ranks of a group hold a sequence, one part after the other. How long they are is asked at each pass."""

    can_grow = False

    def __init__(self, group: dist.ProcessGroup | DeviceMesh | None = None):
        self.shards = SequenceShards(1, group)

    def place(self, x: Tensor, token_mask: Tensor | None) -> Place:
        """ValueError on all ranks where they hold different numbers of rows."""
        described = torch.tensor([x.shape[0], x.shape[1], token_mask is not None])
        found = [tuple(part.tolist()) for part in self.shards.gather_rows(described)]
        rows, lengths, masks = zip(*found, strict=True)
        if len(set(rows)) > 1:
            raise ValueError(f"every rank must hold its part of the same rows; they hold {rows} rows")
        if lengths != self.shards.lengths:
            self.shards = SequenceShards(x.shape[1], self.shards.group)
        if any(masks) and token_mask is None:
            token_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return _ShardedPlace(self.shards, token_mask)

    def span(self, tokens: int) -> tuple[int, int]:
        lengths = self.shards.gather(tokens)
        return sum(lengths[: self.shards.rank]), sum(lengths)

    def before(self, counts: Tensor) -> Tensor:
        return torch.stack(self.shards.gather_rows(counts))[: self.shards.rank].sum(0)

    def most(self, number: int) -> int:
        return max(self.shards.gather(number))

    def following(self, labels: Tensor) -> Tensor:
        firsts = [*self.shards.gather_rows(labels[:, :1])[self.shards.rank + 1 :], torch.full_like(labels[:, :1], -100)]
        return torch.cat((labels[:, 1:], firsts[0]), 1)

    def total(self, part: Tensor) -> Tensor:
        """Its gradient is that of this rank's part."""
        own = part.detach()
        return part + (torch.stack(self.shards.gather_rows(own)).sum(0) - own)


class _ShardedPlace(Place):
    def __init__(self, shards: SequenceShards, token_mask: Tensor | None):
        super().__init__(shards.start, shards.total, token_mask)
        self.shards = shards

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **options: Any) -> Tensor:
        return attend(q, k, v, pattern, self.shards, token_mask=self.token_mask, **options)

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, **options: Any) -> Tensor:
        return attend_all(q, k, v, self.shards, token_mask=self.token_mask, **options)

    def tokens_first(self) -> bool:
        """ValueError where they do not stand first."""
        if self.token_mask is None:
            return True
        here = torch.stack((self.token_mask.sum(1), torch.full_like(self.token_mask[:, 0], super().tokens_first())))
        tokens, in_order = torch.stack(self.shards.gather_rows(here)).unbind(1)  # [R, B]
        is_short = tokens < torch.tensor(self.shards.lengths, device=tokens.device)[:, None]
        if not in_order.all() or (is_short[:-1] & (tokens[1:] > 0)).any():
            raise ValueError(
                "padding may stand only at the end of rows that lie on several ranks, behind all their tokens"
            )
        return True

    def anywhere(self, found: bool) -> bool:
        return any(self.shards.gather(found))
