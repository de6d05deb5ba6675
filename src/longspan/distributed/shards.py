"""How a sequence lies on the ranks of a process group, and how the ranks send each other parts of it.

R ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


class SequenceShards:
    """Rank r of the group holds the tokens from starts[r] to before ends[r], and every rank the same number of rows.

    tokens: of this rank; they may be fewer or more than those of others. group: a process group, a one-dimensional
    DeviceMesh such as mesh["sequence"], or None for all processes.
    bytes_sent: by this rank to others so far, for keys, values, masks, the queries of global rows with their answers
    and, in the backward pass, their gradients.
    Every rank of the group makes one, at the same time. Raises RuntimeError where torch.distributed was not started,
    ValueError on all ranks where one has no tokens.
    """

    def __init__(self, tokens: int, group: dist.ProcessGroup | DeviceMesh | None = None):
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not started: run under torchrun and call torch.distributed.init_process_group()"
            )
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"a sequence lies along one dimension of a mesh, such as mesh['sequence']; got {group}"
                )
            group = group.get_group()
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.device = torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")
        self.bytes_sent = 0
        self._agreed: set[str] = set()
        self.lengths = self.gather(tokens)
        if min(self.lengths) < 1:
            raise ValueError(f"every rank must hold at least one token; they hold {self.lengths}")
        self.ends = tuple(accumulate(self.lengths))
        self.starts = tuple(end - length for end, length in zip(self.ends, self.lengths, strict=True))

    @property
    def start(self) -> int:
        return self.starts[self.rank]

    @property
    def end(self) -> int:
        return self.ends[self.rank]

    @property
    def total(self) -> int:
        return self.ends[-1]

    def gather(self, number: int) -> tuple[int, ...]:
        """What each rank gives."""
        return tuple(int(value) for value in self.gather_rows(torch.tensor([number])))

    def gather_rows(self, own: Tensor) -> list[Tensor]:
        """What each rank gives, of the same shape and dtype everywhere. No gradients."""
        sent = own.detach().contiguous().to(self.device)
        found = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(found, sent, group=self.group)
        return [part.to(own.device) for part in found]

    def agree(self, description: str) -> None:
        """ValueError on all ranks where their descriptions differ. What has been agreed upon is not asked again."""
        if description in self._agreed:
            return
        digest = int.from_bytes(hashlib.sha256(description.encode()).digest()[:7], "big")
        found = self.gather(digest)
        if len(set(found)) > 1:
            others = [rank for rank, value in enumerate(found) if value != digest]
            raise ValueError(
                f"the ranks ask for different things: rank {self.rank} asks for {description}; not so {others}"
            )
        self._agreed.add(description)

    def exchange(self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]]) -> Exchange:
        """Starts to send tensors to each rank and to receive others; all of one dtype, and at least one of them all.

        sent: for each rank a list of tensors. shapes: for each rank those of the tensors that come from it. Every rank
        takes part, also where it sends and receives nothing. Gradients go back the same way.
        """
        flat = torch.cat([part.reshape(-1) for parts in sent for part in parts])
        counts = [sum(part.numel() for part in parts) for parts in sent]
        expected = [sum(map(prod, given)) for given in shapes]
        works: list[Any] = []
        received = _AllToAll.apply(flat, counts, expected, self, works)
        assert isinstance(received, Tensor)
        return Exchange(received, works[0], [list(given) for given in shapes])

    def start_all_to_all(self, received: Tensor, sent: Tensor, expected: list[int], counts: list[int]) -> Any:
        """As bytes, which every backend can send whatever the dtype."""
        size = sent.element_size()
        self.bytes_sent += size * (sum(counts) - counts[self.rank])
        return dist.all_to_all_single(
            received.view(torch.uint8),
            sent.view(torch.uint8),
            [count * size for count in expected],
            [count * size for count in counts],
            group=self.group,
            async_op=True,
        )


class Exchange(NamedTuple):
    """An exchange on its way. received: all that comes, one after the other; not there before `wait`."""

    received: Tensor
    work: Any
    shapes: list[list[tuple[int, ...]]]

    def wait(self) -> list[list[Tensor]]:
        """For each rank, the tensors that came from it."""
        self.work.wait()
        parts = iter(self.received.split([prod(shape) for given in self.shapes for shape in given]))
        return [[next(parts).view(shape) for shape in given] for given in self.shapes]

    def tie(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """The same, but the backward pass of either sends back the gradients of all that was received, be they all 0:
        the other ranks wait for them, also where nothing of it was read."""
        return _Tied.apply(out, lse, self.received) if self.received.requires_grad else (out, lse)  # type: ignore[return-value]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, counts: list[int], expected: list[int], shards: SequenceShards, works: list[Any]
    ) -> Tensor:
        ctx.counts, ctx.expected, ctx.shards = counts, expected, shards
        received = flat.new_empty(sum(expected))
        works.append(shards.start_all_to_all(received, flat, expected, counts))
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        found = grad.new_empty(sum(ctx.counts))
        ctx.shards.start_all_to_all(found, grad.contiguous(), ctx.counts, ctx.expected).wait()
        return found, None, None, None, None


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
        ctx.received = received.shape, received.dtype, received.device
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:  # type: ignore[override]
        shape, dtype, device = ctx.received
        return grad_out, grad_lse, torch.zeros(shape, dtype=dtype, device=device)
