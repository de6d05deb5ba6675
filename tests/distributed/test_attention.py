"""Sharded attention against one process: outputs, softmax sums and all gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.distributed.ranks import on_ranks

from longspan import attend as attend_whole
from longspan.attention import DilatedSegments, Full, GlobalKeys, SlidingWindow
from longspan.attention.request import DistanceBias
from longspan.distributed import SequenceShards, attend

B, H, D = 2, 4, 8
LENGTHS = {2: (13, 20), 3: (7, 20, 6), 4: (9, 1, 17, 6)}
EVEN = {2: (16, 16), 3: (12, 12, 12), 4: (8, 8, 8, 8)}
BRANCHES = ((4, 1), (12, 3), (64, 4))


def marks(total: int) -> torch.Tensor:
    marked = torch.zeros(B, total, dtype=torch.bool)
    marked[0, [0, 1, total // 2, total - 1]] = True
    marked[1, [total // 3, total // 3 + 1]] = True
    return marked


# name: (pattern for marks, whether it needs them)
PATTERNS = {
    "window": lambda marked: SlidingWindow(3, 2),
    "causal window": lambda marked: SlidingWindow(5, 0),
    "dilated heads": lambda marked: SlidingWindow(2, 1, (1, 2, 3, 4)),
    "window beyond neighbors": lambda marked: SlidingWindow(25, 30),
    "nothing but itself": lambda marked: SlidingWindow(0, 0),
    "full": lambda marked: Full(),
    "full, causal": lambda marked: Full(causal=True),
    "window and globals": lambda marked: SlidingWindow(3, 2) | GlobalKeys(marked),
    "dilated window and globals": lambda marked: SlidingWindow(2, 2, 3) | GlobalKeys(marked),
    "causal window and globals": lambda marked: SlidingWindow(4, 0) | GlobalKeys(marked, causal=True),
    "globals alone": lambda marked: GlobalKeys(marked),
    "segments": lambda marked: DilatedSegments(BRANCHES, H),
    "segments, causal": lambda marked: DilatedSegments(BRANCHES, H, causal=True),
    "segments, interleaved": lambda marked: DilatedSegments(((8, 2), (16, 4)), H, True, "interleaved"),
    "one segment over all": lambda marked: DilatedSegments(((1024, 8),), H, causal=True),
    "part of the heads": lambda marked: DilatedSegments(BRANCHES, 2 * H, True, part=(2, 2 + H)),
}


def drawn(total: int, dtype: torch.dtype, padded: bool):
    generator = torch.Generator().manual_seed(total)
    q, k, v, weight = (torch.randn(B, H, total, D, dtype=torch.float64, generator=generator) for _ in range(4))
    mask = None
    if padded:
        mask = torch.rand(B, total, generator=generator) > 0.2
        mask[1, -total // 3 :] = False
        for rows in (q, k, v):
            rows[~mask[:, None].expand(B, H, total)] = torch.nan
    return [rows.to(dtype) for rows in (q, k, v)], weight.to(dtype), mask


def compare(rank: int, world: int, dtype: torch.dtype, tolerance: float) -> None:
    for lengths in (LENGTHS[world], EVEN[world]):
        shards = SequenceShards(lengths[rank])
        here = slice(shards.start, shards.end)
        for name, make in PATTERNS.items():
            for padded in (False, True):
                rows, weight, mask = drawn(shards.total, dtype, padded)
                marked = marks(shards.total)
                whole = [part.clone().requires_grad_() for part in rows]
                expected = attend_whole(*whole, make(marked), token_mask=mask, backend="reference", return_lse=True)
                own = [part[:, :, here].clone().requires_grad_() for part in rows]
                own_mask = None if mask is None else mask[:, here]
                found = attend(*own, make(marked[:, here]), shards, token_mask=own_mask, return_lse=True)
                seen = expected[1] > -torch.inf
                (expected[0] * weight).sum().add(expected[1][seen].sum() / 7).backward()
                (found[0] * weight[:, :, here]).sum().add(found[1][seen[:, :, here]].sum() / 7).backward()
                case = f"{name}, {lengths}, {'padded' if padded else 'no padding'}, rank {rank}"
                compared = [(found[0], expected[0]), (found[1], expected[1])]
                compared += [
                    (torch.zeros_like(part) if part.grad is None else part.grad, other.grad)
                    for part, other in zip(own, whole, strict=True)
                ]
                for what, (one, other) in zip(("out", "lse", "q", "k", "v"), compared, strict=True):
                    torch.testing.assert_close(
                        one,
                        other[:, :, here],
                        rtol=0,
                        atol=tolerance,
                        msg=lambda text, where=f"{case}, {what}": f"{where}: {text}",
                    )


@pytest.mark.parametrize("world", [2, 3, 4])
def test_outputs_and_gradients_are_those_of_one_process(world, tmp_path):
    on_ranks(world, tmp_path, compare, world, torch.float64, 1e-12)


def test_the_kernels_compute_the_parts_of_float32(tmp_path):
    on_ranks(2, tmp_path, compare, 2, torch.float32, 2e-5)


def biased(rank: int) -> None:
    shards = SequenceShards(LENGTHS[3][rank])
    here = slice(shards.start, shards.end)
    (q, k, v), _, _ = drawn(shards.total, torch.float64, False)
    whole, own = (torch.linspace(-1, 1, H * 9, dtype=torch.float64).view(H, 9).requires_grad_() for _ in range(2))
    pattern = SlidingWindow(5, 2)
    expected = attend_whole(q, k, v, pattern, bias=DistanceBias(whole, 3), backend="reference")
    found = attend(*(part[:, :, here] for part in (q, k, v)), pattern, shards, bias=DistanceBias(own, 3))
    torch.testing.assert_close(found, expected[:, :, here])
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.distributed.all_reduce(own.grad)
    torch.testing.assert_close(own.grad, whole.grad)


def test_a_bias_by_distance_goes_across_ranks(tmp_path):
    on_ranks(3, tmp_path, biased)


def learns_from_sums(rank: int) -> None:
    shards = SequenceShards(4)
    k = torch.randn(1, H, 4, D, requires_grad=True)
    _, lse = attend(k, k, k, SlidingWindow(2, 0), shards, return_lse=True)  # the first rank receives nothing
    lse.sum().backward()
    assert k.grad is not None and k.grad.isfinite().all()


def test_the_gradients_of_softmax_sums_alone_find_their_way(tmp_path):
    on_ranks(2, tmp_path, learns_from_sums)


def count_bytes(rank: int, world: int, tokens: int, pattern) -> int:
    shards = SequenceShards(tokens)
    q = torch.randn(1, H, tokens, D)
    attend(q, q, q, pattern, shards)
    return shards.bytes_sent


@pytest.mark.parametrize("tokens", [32, 128])
def test_bytes_of_a_window_do_not_grow_with_the_sequence(tokens, tmp_path):
    world, a_key = 4, 2 * H * D * 4  # and its value
    sent = on_ranks(world, tmp_path, count_bytes, world, tokens, SlidingWindow(8, 3))
    assert sent == [8 * a_key, 11 * a_key, 11 * a_key, 3 * a_key]


@pytest.mark.parametrize("tokens", [32, 128])
def test_bytes_of_a_segment_do_not_grow_at_a_fixed_ratio(tokens, tmp_path):
    world, kept = 4, 16  # of each rank's tokens, for each head
    pattern = DilatedSegments(((world * tokens, tokens // kept),), H, causal=True)
    sent = on_ranks(world, tmp_path, count_bytes, world, tokens, pattern)
    assert sent == [later * kept * 2 * H * D * 4 for later in (3, 2, 1, 0)]


def test_segments_within_a_rank_cost_nothing(tmp_path):
    pattern = DilatedSegments(((8, 1), (16, 2), (32, 4)), H, causal=True)
    assert on_ranks(2, tmp_path, count_bytes, 2, 32, pattern) == [0, 0]


def refused(rank: int) -> list[str]:
    shards = SequenceShards(5 + rank)
    q = torch.randn(1, H, 5 + rank, D)
    marked = torch.zeros(1, 5 + rank, dtype=torch.bool)
    window, segments = SlidingWindow(2, 2), DilatedSegments(((4, 1),), H)
    calls = [
        partial(attend, q, q, q, SlidingWindow(2 + rank, 2), shards),
        partial(attend, q[:, :, 1:], q[:, :, 1:], q[:, :, 1:], window, shards),
        partial(attend, q, q, q, window | segments, shards),
        partial(attend, q, q, q, GlobalKeys(marked) | GlobalKeys(marked, causal=True), shards),
        partial(attend, q, q, q, window | GlobalKeys(marked), shards, bias=DistanceBias(torch.zeros(H, 3), 1)),
        partial(attend, q, q, q, segments, shards, bias=DistanceBias(torch.zeros(H, 3), 1)),
        partial(attend, q, q, q, window, shards, scale=1.0 + rank),
        partial(attend, q, q, q, window | GlobalKeys(marked[:, 1:]), shards),
        partial(attend, q, q, q, window, shards, token_mask=marked.float()),
        partial(SequenceShards, rank),
    ]
    said = []
    for call in calls:
        with pytest.raises((ValueError, NotImplementedError)) as error:
            call()
        said.append(str(error.value))
    return said


def test_what_does_not_fit_is_refused_on_all_ranks(tmp_path):
    for said in on_ranks(2, tmp_path, refused):
        for text, expected in zip(
            said,
            (
                "the ranks ask for different things",
                "tokens of this rank",
                "not united with others",
                "only one GlobalKeys",
                "a bias by distance cannot be sharded",
                "a bias by distance cannot be sharded",
                "the ranks ask for different things",
                "GlobalKeys.marked must be Bool",
                "token_mask must be Bool",
                r"every rank must hold at least one token; they hold (0, 1)",
            ),
            strict=True,
        ):
            assert expected in text


def test_without_a_group_it_says_how_to_start_one():
    with pytest.raises(RuntimeError, match="torchrun"):
        SequenceShards(8)
