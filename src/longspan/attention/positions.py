"""Where tokens stand, brought into q and k before attention, or into the scores as a bias by distance.

A score depends on positions only through query - key, whichever of these is used.

Shapes: B batch, H heads, N tokens, D head width, R relative width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.attention.request import DistanceBias

_LARGEST_EXPONENT = 80.0  # e ** 88 is the largest float32 and bfloat16


class Rotation(NamedTuple):
    """Complex numbers that turn q and k, [B or 1, 1, N, D/2] each."""

    q: Tensor
    k: Tensor


def turn(x: Tensor, by: Tensor) -> Tensor:
    """x [B, H, N, D] with its neighbouring pairs of numbers multiplied as complex numbers by [B or 1, 1, N, D/2]."""
    wide = x.to(by.real.dtype)
    return torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * by).flatten(-2).to(x.dtype)


class Rotary(NamedTuple):
    """Rotary positions and, with a `decay_base`, xPos: what is further away weighs less, more so in fast-turning pairs.

    width: D. base: of the wavelengths. decay_base: xPos's scale_base, in tokens; None: no decay. Only a causal model
    has a direction to decay in.
    Sources: RoFormer, arXiv 2104.09864, section 3.2.2; xPos, arXiv 2212.10554, section 2.2.
    """

    width: int
    base: float = 10000.0
    decay_base: float | None = None

    def at(self, positions: Tensor, origin: int, dtype: torch.dtype) -> Rotation:
        """positions: Long[B or 1, N]. origin: the position whose decay is 1; both sides of a score need the same."""
        pairs = torch.arange(self.width // 2, dtype=torch.float64, device=positions.device) / (self.width // 2)
        wide = torch.promote_types(dtype, torch.float32)
        # Float64, because a large position times a frequency has few digits left in float32.
        exact = positions[:, None, :, None].double()
        angles = (exact * self.base**-pairs).remainder(2 * math.pi).to(wide)
        if self.decay_base is None:
            rotation = torch.polar(torch.ones_like(angles), angles)
            return Rotation(rotation, rotation)
        faded = ((exact - origin) / self.decay_base * self._log_decay(pairs)).exp()
        return Rotation(torch.polar(faded.to(wide), angles), torch.polar((1 / faded).to(wide), angles))

    @property
    def span(self) -> float:
        """How many tokens a position may stand away from `origin` before the decay overflows."""
        if self.decay_base is None:
            return math.inf
        return self.decay_base * _LARGEST_EXPONENT / -math.log(0.4 / 1.4)

    def middle(self, tokens: int) -> int:
        """The origin for so many tokens in one pass. ValueError where their decay would overflow."""
        if tokens / 2 > self.span:
            assert self.decay_base is not None
            raise ValueError(
                f"xPos with xpos_scale_base={self.decay_base:g} overflows beyond {int(2 * self.span)} tokens in one "
                f"pass; got {tokens}. Give fewer, an xpos_scale_base of at least "
                f"{math.ceil(tokens / 2 / self.span * self.decay_base)}, or positions that do not fade"
            )
        return tokens // 2

    def moved(self, tokens: int, device: torch.device) -> Tensor:
        """Float64[D]: what turned keys are multiplied by when the origin moves up by `tokens`."""
        assert self.decay_base is not None
        pairs = torch.arange(self.width // 2, dtype=torch.float64, device=device) / (self.width // 2)
        return (self._log_decay(pairs) * tokens / self.decay_base).exp().repeat_interleave(2)

    def _log_decay(self, pairs: Tensor) -> Tensor:
        return ((pairs + 0.4) / 1.4).log()


class RelativeSinusoids(nn.Module):
    """Transformer-XL's scores: (q_i + u) k_j + (q_i + v) W sinusoids(i - j).

    sin(i - j) and cos(i - j) are sums of products of a factor of i and a factor of j, so the second term is a product
    of `width` more numbers at either side: q, k and v come out D + R wide, for any backend.
    Source: Transformer-XL, arXiv 1901.02860, section 3.3; W is each head's own and reads R sinusoids.
    """

    def __init__(self, heads: int, head_width: int, width: int):
        super().__init__()
        self.width = width
        self.content_bias = nn.Parameter(torch.zeros(heads, 1, head_width))  # u
        self.position_bias = nn.Parameter(torch.zeros(heads, 1, head_width))  # v
        self.weight = nn.Parameter(torch.empty(heads, head_width, width).normal_(std=0.02))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, H, N, D] -> [B, H, N, D + R]; the scores' scale stays D ** -0.5, v's new numbers are 0."""
        far = turn((q + self.position_bias.to(q.dtype)) @ self.weight.to(q.dtype), rotation.q)
        waves = torch.view_as_real(rotation.k).flatten(-2).to(k.dtype).expand(*k.shape[:3], -1)
        return (
            torch.cat((q + self.content_bias.to(q.dtype), far), -1),
            torch.cat((k, waves), -1),
            F.pad(v, (0, self.width)),
        )


class DistanceBuckets(nn.Module):
    """T5's relative bias: a number for each head and bucket of distances, added to the scores.

    Half of the buckets hold one distance each, the others grow by the logarithm up to `max_distance`; what is further
    away shares the last one. Without `causal`, half of all are for keys that follow the query.
    Source: T5, arXiv 1910.10683, section 2.1.
    """

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128, causal: bool = True):
        super().__init__()
        one_sided = buckets if causal else buckets // 2
        if one_sided < 2 or max_distance <= one_sided // 2:
            raise ValueError(
                f"relative buckets need at least {2 if causal else 4} buckets and max_distance above "
                f"{max(one_sided, 2) // 2}, the distances with a bucket each; got buckets={buckets}, "
                f"max_distance={max_distance}"
            )
        self.buckets, self.max_distance, self.causal = buckets, max_distance, causal
        self.weight = nn.Parameter(torch.empty(buckets, heads).normal_(std=0.02))

    def forward(self) -> DistanceBias:
        ahead = 0 if self.causal else self.max_distance
        distances = torch.arange(-ahead, self.max_distance + 1, device=self.weight.device)  # query - key
        return DistanceBias(self.weight[self.bucket(distances)].T, ahead)

    def bucket(self, distances: Tensor) -> Tensor:
        """The bucket of each distance, query - key, in tokens."""
        one_sided, first = self.buckets, torch.zeros_like(distances)
        if not self.causal:
            one_sided //= 2
            first = one_sided * (distances < 0)
        exact = one_sided // 2
        apart = distances.abs() if not self.causal else distances.clamp(min=0)
        growth = (apart.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (growth * (one_sided - exact)).long()).clamp(max=one_sided - 1)
        return first + torch.where(apart < exact, apart, far)
