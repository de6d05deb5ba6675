"""Attention alone as cases: one sliding window on given q, k and v, and its memory at growing length.

Shapes: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan.attention import DilatedSegments, SlidingWindow, attend
from longspan.bench import peers
from longspan.bench.measure import Prepared, System
from longspan.bench.peers import Attend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative errors against float64. bf16 keeps 8 bits; a backward pass rounds twice more.
TOLERANCE = {("fp32", False): 1e-5, ("fp32", True): 1e-5, ("bf16", False): 1e-2, ("bf16", True): 2e-2}
GEMM = "oneDNN GEMM"


class Peer(NamedTuple):
    """make: from q and the window on each side, the attention and a note. forward_only: why it has no gradients."""

    name: str
    make: Callable[[Tensor, int], tuple[Attend, str]]
    forward_only: str | None = None
    missing: Callable[[], str | None] = lambda: None


def ours(q: Tensor, window: int, *, backend: str) -> tuple[Attend, str]:
    return partial(attend, pattern=SlidingWindow(window, window), backend=backend), ""


NATIVE = Peer("longspan native", partial(ours, backend="native"))
HUGGING_FACE = Peer("Hugging Face chunks", peers.hugging_face_chunks)
CHUNKED_SDPA = Peer("SDPA on chunks", peers.chunked_sdpa)
PEERS = (
    Peer("longspan banded (PyTorch)", partial(ours, backend="banded")),
    CHUNKED_SDPA,
    Peer("FlexAttention", peers.flex_attention, "FlexAttention has no backward pass on CPU"),
    Peer("dense SDPA", peers.dense_sdpa),
    HUGGING_FACE,
    Peer(
        "local-attention",
        peers.local_attention,
        missing=lambda: peers.missing("local_attention", pip="local-attention"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """A sliding window over one row. window: tokens seen on each side. The yardstick is oneDNN's matrix product."""

    precision: str
    backward: bool
    tokens: int = 4096
    heads: int = 16
    width: int = 64
    window: int = 256
    compiled: bool = True
    gemm: tuple[int, int, int] = (4096, 1024, 1024)  # rows, inputs and outputs of a linear layer

    @property
    def name(self) -> str:
        return f"forward{' and backward' if self.backward else ''}, {self.precision}"

    @property
    def shape(self) -> dict[str, Any]:
        return {"batch": 1, **asdict(self)}

    @property
    def reference(self) -> str:
        return "float64"

    @property
    def flops(self) -> float:
        """Of the scores and sums that the window asks for; a backward pass has five products for the forward's two."""
        forward = 4.0 * self.heads * self.tokens * (2 * self.window + 1) * self.width
        return forward * (3.5 if self.backward else 1)

    def expected(self) -> tuple[Tensor, ...]:
        q, k, v, grad = self._tensors()
        return exact(q, k, v, grad if self.backward else None, self.window)

    def systems(self) -> list[System]:
        systems = [self._system(NATIVE, ours=True), *(self._system(peer) for peer in PEERS)]
        return systems if self.backward else [*systems, gemm_system(self.precision, self.gemm)]

    def _system(self, peer: Peer, *, ours: bool = False) -> System:
        left_out = peer.forward_only if self.backward else None
        if left_out is None and peer.make is peers.flex_attention and not self.compiled:
            left_out = "compiling takes longer than --quick"
        return System(
            name=peer.name,
            precision=self.precision,
            prepare=partial(self._prepare, peer),
            tolerance=TOLERANCE[self.precision, self.backward],
            ours=ours,
            flops=self.flops,
            left_out=left_out,
            missing=peer.missing(),
        )

    def _tensors(self) -> list[Tensor]:
        """q, k, v and the gradient of the output, [1, H, N, D]; ours reads the same numbers as the peers."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.heads, self.tokens, self.width)
        return [torch.randn(shape, generator=generator).to(DTYPES[self.precision]) for _ in range(4)]

    def _prepare(self, peer: Peer) -> Prepared:
        q, k, v, grad = self._tensors()
        if peer is NATIVE:  # as a fused projection gives them
            q, k, v = torch.stack((q, k, v), 0).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4).unbind()
        run, note = peer.make(q, self.window)
        if not self.backward:
            return Prepared(partial(_forward, run, q, k, v), lambda out: (out,), note)
        leaves = [part.detach().requires_grad_() for part in (q, k, v)]
        return Prepared(partial(_forward_backward, run, leaves, grad), lambda outputs: outputs, note)


@dataclass(frozen=True, kw_only=True)
class DilatedCase:
    """LongNet's attention forward over one row. The yardstick is oneDNN's matrix product."""

    precision: str
    tokens: int = 16384
    heads: int = 16
    width: int = 64
    branches: tuple[tuple[int, int], ...] = ((2048, 1), (4096, 2), (8192, 4), (16384, 8))
    gemm: tuple[int, int, int] = (4096, 1024, 1024)

    @property
    def name(self) -> str:
        return f"LongNet attention, {self.tokens:,} tokens, {self.precision}"

    @property
    def shape(self) -> dict[str, Any]:
        return {"batch": 1, **asdict(self)}

    @property
    def reference(self) -> str:
        return "float64"

    @property
    def flops(self) -> float:
        """A token that a branch keeps meets the tokens that it keeps of the same segment."""
        keys = sum(length / stride**2 for length, stride in self.branches)
        return 4.0 * self.heads * self.tokens * keys * self.width

    def expected(self) -> tuple[Tensor, ...]:
        return (exact_dilated(*self._tensors(), self._pattern()),)

    def systems(self) -> list[System]:
        names = {"native": "longspan native", "segments": "longspan segments (PyTorch)"}
        systems = [
            System(
                name=name,
                precision=self.precision,
                prepare=partial(self._prepare, backend),
                tolerance=TOLERANCE[self.precision, False],
                ours=backend == "native",
                flops=self.flops,
            )
            for backend, name in names.items()
        ]
        return [*systems, gemm_system(self.precision, self.gemm)]

    def _pattern(self) -> DilatedSegments:
        return DilatedSegments(self.branches, heads=self.heads)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [1, H, N, D], as a fused projection gives them."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.tokens, 3, self.heads, self.width)
        q, k, v = torch.randn(shape, generator=generator).to(DTYPES[self.precision]).permute(2, 0, 3, 1, 4).unbind()
        return q, k, v

    def _prepare(self, backend: str) -> Prepared:
        run = partial(attend, pattern=self._pattern(), backend=backend)
        return Prepared(partial(_forward, run, *self._tensors()), lambda out: (out,))


def gemm_system(precision: str, gemm: tuple[int, int, int]) -> System:
    """A linear layer with its weight laid out for oneDNN beforehand: the practical peak of this machine."""
    rows, inputs, outputs = gemm
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator).to(DTYPES[precision])
    weight = torch.randn(outputs, inputs, generator=generator).to(DTYPES[precision])

    def prepare() -> Prepared:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        run = partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], "")
        return Prepared(torch.inference_mode()(run), lambda out: (out,))

    return System(
        name=GEMM,
        precision=precision,
        prepare=prepare,
        tolerance=TOLERANCE[precision, False],
        flops=2.0 * rows * inputs * outputs,
        yardstick=True,
        expected=lambda: (x.double() @ weight.double().T,),
    )


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """The resident growth of one call at a length: the output and all besides; the inputs are there before."""

    tokens: int
    heads: int = 4
    width: int = 64
    window: int = 256
    beside_others: bool = True

    @property
    def name(self) -> str:
        return f"memory, {self.tokens:,} tokens"

    @property
    def shape(self) -> dict[str, Any]:
        row = self.heads * self.width * 4 / 2**20
        scores = self.heads * (2 * self.window + 1) * 4 / 2**20
        return asdict(self) | {"fp32_output_mib": row * self.tokens, "fp32_scores_mib": scores * self.tokens}

    @property
    def reference(self) -> str:
        return ""

    def expected(self) -> None:
        return None

    def systems(self) -> list[System]:
        rows = [
            ("longspan native", NATIVE, "fp32", False),
            ("longspan native", NATIVE, "bf16", False),
            ("longspan native, forward and backward", NATIVE, "fp32", True),
            ("SDPA on chunks", CHUNKED_SDPA, "fp32", False),
            ("Hugging Face chunks", HUGGING_FACE, "fp32", False),
        ]
        return [
            System(
                name=name,
                precision=precision,
                prepare=partial(self._prepare, peer, precision, backward),
                tolerance=None,
                ours=peer is NATIVE,
                left_out=None if peer is NATIVE else self._too_large(),
            )
            for name, peer, precision, backward in rows[: None if self.beside_others else 1]
        ]

    def _too_large(self) -> str | None:
        """Peers that keep N x window scores hold about five such buffers at once; half of the free memory may go."""
        needed, free = 5 * self.shape["fp32_scores_mib"], available_mib()
        return f"would need about {needed / 1024:.0f} GiB" if free is not None and needed > free / 2 else None

    def _prepare(self, peer: Peer, precision: str, backward: bool) -> Prepared:
        def call(tokens: int) -> Callable[[], Any]:
            case = AttentionCase(
                precision=precision,
                backward=backward,
                tokens=tokens,
                heads=self.heads,
                width=self.width,
                window=self.window,
            )
            return case._prepare(peer).run

        call(4 * self.window)()  # loads libraries and starts threads, which is not this call's memory
        return Prepared(call(self.tokens), lambda outputs: ())


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, window: int) -> tuple[Tensor, ...]:
    """out [1, H, N, D] in float64, with a gradient also those of q, k and v: dense, written out, one head at a time."""
    position = torch.arange(q.shape[2])
    hidden = (position[:, None] - position).abs() > window
    heads = []
    for head in range(q.shape[1]):
        leaves = [part[0, head].double().requires_grad_(grad is not None) for part in (q, k, v)]
        scores = leaves[0] @ leaves[1].T * q.shape[3] ** -0.5
        out = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ leaves[2]  # [N, D]
        gradients = () if grad is None else torch.autograd.grad(out, leaves, grad[0, head].double())
        heads.append((out.detach(), *gradients))
    return tuple(torch.stack(parts)[None] for parts in zip(*heads, strict=True))


def exact_dilated(q: Tensor, k: Tensor, v: Tensor, pattern: DilatedSegments) -> Tensor:
    """out [1, H, N, D] in float64: each segment of each branch dense, mixed by the sums of their softmaxes."""
    batch, heads, tokens, width = q.shape
    out, lse = q.new_zeros(q.shape, dtype=torch.float64), q.new_full((batch, heads, tokens, 1), -torch.inf).double()
    for head in range(heads):
        for length, stride in pattern.branches:
            for start in range(0, tokens, length):
                kept = slice(start + pattern.offset(head, stride), min(tokens, start + length), stride)
                queries, keys, values = (part[:, head, kept].double() for part in (q, k, v))
                scores = queries @ keys.mT * width**-0.5
                if pattern.causal:
                    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
                before, own = lse[:, head, kept], scores.logsumexp(-1, keepdim=True)
                total = torch.logaddexp(before, own)
                mixed = out[:, head, kept] * (before - total).exp() + scores.softmax(-1) @ values * (own - total).exp()
                out[:, head, kept], lse[:, head, kept] = mixed, total
    return out


def _forward(run: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.inference_mode():
        return run(q, k, v)


def _forward_backward(run: Attend, leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    out = run(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def available_mib() -> float | None:
    """Memory that is free for new work; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:")), None)
