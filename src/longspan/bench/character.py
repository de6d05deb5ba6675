"""Training the Longformer's character model: the same model and step with other ways to compute its attention.

Shapes: B batch, H heads, N tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from longspan.attention import SlidingWindow, attend
from longspan.bench import peers
from longspan.bench.measure import Prepared, System
from longspan.kernels.memory import keep_freed_memory

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # of the logits, against SDPA in fp32
OURS, BANDED, LOCAL = "longspan", "longspan banded (PyTorch)", "local-attention"
Attention = Callable[..., Tensor]  # attend's arguments


@dataclass(frozen=True, kw_only=True)
class CharacterCase:
    """A training step (forward, backward, AdamW) of LongformerLMConfig.tiny() on random characters.

    bf16 is autocast, and freed memory is kept, as in training. Nobody drops anything: longspan's kernels have no
    dropout of probabilities.
    """

    precision: str
    batch: int = 2
    tokens: int = 4096
    vocabulary: int = 27
    tiny: bool = False

    @property
    def name(self) -> str:
        return f"training step of the character model, {self.batch * self.tokens:,} tokens, {self.precision}"

    @property
    def shape(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def reference(self) -> str:
        return "SDPA fp32"

    def expected(self) -> tuple[Tensor, ...]:
        model, ids = self._model(), self._ids()
        with torch.no_grad(), attending(partial(attend, backend="sdpa")):
            return (model(ids).logits,)

    def systems(self) -> list[System]:
        keep_freed_memory()
        ways = {
            OURS: attend,
            BANDED: partial(attend, backend="banded"),
            LOCAL: local_attention,
        }
        return [
            System(
                name=name,
                precision=self.precision,
                prepare=partial(self._prepare, way),
                tolerance=TOLERANCE[self.precision],
                ours=name == OURS,
                missing=peers.missing("local_attention", pip="local-attention") if name == LOCAL else None,
            )
            for name, way in ways.items()
        ]

    def _ids(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (self.batch, self.tokens), generator=generator)

    def _model(self) -> Any:
        from longspan.models.longformer_lm import LongformerForCausalLM, LongformerLMConfig

        small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "windows": 8} if self.tiny else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LongformerForCausalLM(LongformerLMConfig.tiny(vocab_size=self.vocabulary, dropout=0.0, **small))

    def _prepare(self, way: Attention) -> Prepared:
        model, ids = self._model().train(), self._ids()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        cast = torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else nullcontext()

        def step() -> Tensor:
            with attending(way):
                with cast:
                    out = model(ids, labels=ids)
                out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return out.logits.detach()

        tokens = self.batch * self.tokens
        return Prepared(step, lambda logits: (logits.float(),), f"{tokens:,} tokens a step")


@contextmanager
def attending(way: Attention) -> Iterator[None]:
    """The attention of our models is computed that way."""
    from longspan.models import sequence

    with patch.object(sequence, "attend", way):
        yield


def local_attention(q: Tensor, k: Tensor, v: Tensor, pattern: SlidingWindow, **options: Any) -> Tensor:
    """A causal window by lucidrains' local-attention, which has no dilation: dilated heads are taken apart into rows of
    every n-th token, as views, for each of which it is an ordinary window."""
    assert options.get("token_mask") is None and options.get("bias") is None and not options.get("dropout")
    run = _local_attention(pattern.before, options["scale"])
    dilations = pattern.dilation if isinstance(pattern.dilation, tuple) else (pattern.dilation,) * q.shape[1]
    out = torch.empty_like(q)
    for dilation in sorted(set(dilations)):
        heads = [head for head, own in enumerate(dilations) if own == dilation]
        some = slice(heads[0], heads[-1] + 1)  # a layer's dilated heads are neighbors
        for residue in range(dilation):
            rows = (part[:, some, residue::dilation] for part in (q, k, v))
            out[:, some, residue::dilation] = run(*rows)
    return out


@lru_cache(maxsize=32)
def _local_attention(window: int, scale: float) -> Attention:
    from local_attention import LocalAttention  # pyright: ignore[reportMissingImports]

    exact = {"causal": True, "exact_windowsize": True, "autopad": True, "use_rotary_pos_emb": False}
    return LocalAttention(window_size=window, look_backward=1, scale=scale, **exact)
