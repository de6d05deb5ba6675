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
from longspan.models.evidence import LongspanForEvidence
from longspan.models.language_model import StackPreTrainedModel
from longspan.models.model import LongspanPreTrainedModel
from longspan.models.sequence import Place, WholeSequence, first_tokens


def shard(model: nn.Module, group: dist.ProcessGroup | DeviceMesh | None = None) -> None:
    """From now on the tokens that `model` is given are this rank's part of sequences that lie on a group's ranks.

    model: a model of ours, language model or encoder with any head or none (not LongspanForEvidence), or a `Decoder` or
    `Encoder` alone. Its forward is called on all ranks together, each with the same number of rows and any number of
    tokens, one at least; rank after rank they make the sequence.
    What comes out is this rank's part of one process's output and, where it is of whole rows (their loss, their class,
    the pooler's vector), all of it on every rank. The gradients of weights add up over the ranks to those of one
    process. (DistributedDataParallel takes their mean: multiply the loss by the number of ranks in a group.) Labels of
    rows, places of answers and ranges of spans, which count from the start of the sequence, are given to all ranks.
    Dropout draws from each rank's own generator: seed the ranks differently.
    group: as in `SequenceShards`. None for all processes.
    Raises RuntimeError where torch.distributed was not started, NotImplementedError for other models.
    """
    parts = _parts(model)
    is_ours = isinstance(model, Decoder | Encoder | StackPreTrainedModel | LongspanPreTrainedModel)
    computes = any(isinstance(part, Decoder | Encoder) for part in parts)  # and is not packed for inference
    if not is_ours or not computes or isinstance(model, LongspanForEvidence):
        raise NotImplementedError(
            f"{type(model).__name__} cannot be sharded along its sequences; there are LongformerForCausalLM, "
            f"LongNetForCausalLM, LongspanModel and its heads but for LongspanForEvidence, not packed for inference, "
            f"and the Encoder alone"
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

    def least(self, numbers: Tensor) -> Tensor:
        return torch.stack(self.shards.gather_rows(numbers)).amin(0)

    def total(self, part: Tensor) -> Tensor:
        """Its gradient is that of this rank's part."""
        own = part.detach()
        return part + (torch.stack(self.shards.gather_rows(own)).sum(0) - own)

    def shared(self, part: Tensor) -> Tensor:
        return _Shared.apply(part, self.shards)  # type: ignore[return-value]

    def once(self, alike: Tensor) -> Tensor:
        """The first rank's, as dropout may have made them different, and so are its gradients."""
        return _Once.apply(alike, self.shards)  # type: ignore[return-value]

    def whole(self, part: Tensor) -> Tensor:
        lengths = self.shards.gather(part.shape[1])
        longest = torch.cat(
            (part.detach(), part.new_zeros(len(part), max(lengths) - part.shape[1], *part.shape[2:])), 1
        )
        parts = [rows[:, :length] for rows, length in zip(self.shards.gather_rows(longest), lengths, strict=True)]
        parts[self.shards.rank] = part
        return torch.cat(parts, 1)

    def first(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        held = torch.ones_like(x[:, 0, 0], dtype=torch.bool) if token_mask is None else token_mask.any(1)
        holder = torch.stack(self.shards.gather_rows(held)).int().argmax(0)
        return self.shared(torch.where((holder == self.shards.rank)[:, None], first_tokens(x, token_mask), 0))


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, shards: SequenceShards) -> Tensor:
        ctx.shards = shards
        return torch.stack(shards.gather_rows(part)).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return torch.stack(ctx.shards.gather_rows(grad)).sum(0), None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alike: Tensor, shards: SequenceShards) -> Tensor:
        ctx.counts = shards.rank == 0
        return shards.gather_rows(alike)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad if ctx.counts else torch.zeros_like(grad), None


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
