"""Positions: what scores they give, at any distance from the origin and from the beginning."""

import math

import pytest
import torch

from longspan.attention import Full, attend
from longspan.attention.positions import DistanceBuckets, RelativeSinusoids, Rotary, turn

HEADS, TOKENS, WIDTH = 2, 12, 8


def rows(tokens=TOKENS, width=WIDTH):
    torch.manual_seed(0)
    return torch.randn(3, 1, HEADS, tokens, width, dtype=torch.float64)


def scores(q, k, rotary, shift=0, origin=0):
    rotation = rotary.at(torch.arange(q.shape[2])[None] + shift, origin + shift, q.dtype)
    return turn(q, rotation.q) @ turn(k, rotation.k).mT


@pytest.mark.parametrize("decay_base", [None, 16.0, 21.0])
def test_scores_depend_on_distances_only(decay_base):
    q, k, _ = rows()
    rotary = Rotary(WIDTH, decay_base=decay_base)
    expected = scores(q, k, rotary)
    assert torch.allclose(scores(q, k, rotary, shift=1_000_000), expected, atol=1e-8)
    assert torch.allclose(scores(q, k, rotary, origin=7), expected, atol=1e-12)


def test_xpos_is_the_papers_formula():
    q, k, _ = rows()
    found = scores(q, k, Rotary(WIDTH, decay_base=512.0))
    for i, j in [(5, 5), (9, 2), (2, 9)]:
        expected = 0.0
        for pair in range(WIDTH // 2):
            angle = (i - j) * 10000 ** (-2 * pair / WIDTH)
            fade = ((2 * pair / WIDTH + 0.4) / 1.4) ** ((i - j) / 512)
            (a, b), (c, d) = q[0, 0, i, 2 * pair : 2 * pair + 2], k[0, 0, j, 2 * pair : 2 * pair + 2]
            expected += fade * ((a * c + b * d) * math.cos(angle) + (a * d - b * c) * math.sin(angle))
        assert found[0, 0, i, j] == pytest.approx(float(expected), abs=1e-12)


def test_a_far_position_is_as_exact_as_a_near_one_in_float32():
    q, k, _ = rows().float()
    rotary = Rotary(WIDTH)
    assert torch.allclose(scores(q, k, rotary, shift=3_000_000), scores(q, k, rotary), atol=1e-5)


def test_xpos_refuses_more_tokens_than_float32_can_hold():
    rotary = Rotary(64, decay_base=512.0)
    q = torch.ones(1, 1, 65_000, 64)
    rotation = rotary.at(torch.arange(65_000)[None], rotary.middle(65_000), torch.float32)
    assert turn(q, rotation.q).isfinite().all() and turn(q, rotation.k).isfinite().all()
    with pytest.raises(ValueError, match=r"overflows beyond 65391 tokens in one pass; got 100000.*at least 783"):
        rotary.middle(100_000)
    assert Rotary(64, decay_base=783.0).middle(100_000) == 50_000
    assert Rotary(64).middle(10**9) == 5 * 10**8


def test_moved_keys_are_those_of_the_other_origin():
    _, k, _ = rows()
    rotary = Rotary(WIDTH, decay_base=16.0)
    positions = torch.arange(TOKENS)[None]
    early, late = (turn(k, rotary.at(positions, origin, k.dtype).k) for origin in (3, 40))
    assert torch.allclose(early * rotary.moved(37, k.device), late, atol=1e-12)


def test_relative_sinusoids_are_transformer_xls_scores():
    q, k, v = rows()
    relative = RelativeSinusoids(HEADS, WIDTH, 6).double()
    with torch.no_grad():
        for parameter in relative.parameters():
            parameter.normal_()
    rotation = Rotary(6).at(torch.arange(TOKENS)[None], 0, torch.float64)
    wide_q, wide_k, wide_v = relative(q, k, v, rotation)
    distance = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).double()
    angles = distance[..., None] * 10000 ** -(torch.arange(3) / 3).double()
    # A pair of W's columns reads (cos, -sin): as Transformer-XL's sinusoids up to order and sign, which W learns.
    waves = torch.stack((angles.cos(), -angles.sin()), -1).flatten(-2)  # [N, N, R]
    weights = (q + relative.position_bias) @ relative.weight
    expected = (q + relative.content_bias) @ k.mT + torch.einsum("bhir,ijr->bhij", weights, waves)
    assert torch.allclose(wide_q @ wide_k.mT, expected, atol=1e-12)
    out = attend(wide_q, wide_k, wide_v, Full(), scale=WIDTH**-0.5)
    assert torch.allclose(out[..., :WIDTH], (expected * WIDTH**-0.5).softmax(-1) @ v, atol=1e-12)
    assert not out[..., WIDTH:].any()


def test_relative_sinusoids_pass_gradients_to_every_weight():
    relative = RelativeSinusoids(HEADS, WIDTH, 6).double()
    q, k, v = rows()
    rotation = Rotary(6).at(torch.arange(TOKENS)[None], 0, torch.float64)

    def out(*weights):
        named = dict(zip(("content_bias", "position_bias", "weight"), weights, strict=True))
        wide = torch.func.functional_call(relative, named, (q, k, v, rotation))
        return attend(*wide, Full(causal=True), scale=WIDTH**-0.5, backend="reference")

    assert torch.autograd.gradcheck(out, tuple(p.detach().requires_grad_() for p in relative.parameters()))


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_t5s(causal):
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-300, 301)
    buckets = DistanceBuckets(HEADS, causal=causal)
    theirs = T5Attention._relative_position_bucket(-distances, bidirectional=not causal)
    assert torch.equal(buckets.bucket(distances), theirs)
    bias = buckets()
    assert bias.values.shape == (HEADS, 129 if causal else 257)
    query, key = torch.tensor(5), torch.tensor(2)
    assert bias.at(torch.tensor(1), query, key) == buckets.weight[buckets.bucket(torch.tensor(3)), 1]


def test_buckets_without_room_are_refused():
    with pytest.raises(ValueError, match="max_distance above 16"):
        DistanceBuckets(HEADS, max_distance=16)
    with pytest.raises(ValueError, match="at least 4 buckets"):
        DistanceBuckets(HEADS, buckets=2, causal=False)
