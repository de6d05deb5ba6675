"""DilatedAttention: the drop-in module, against the formula and against the released code's algorithm."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longspan.attention import attend
from longspan.attention.blocks import cut
from longspan.nn import DilatedAttention

WIDTH, HEADS = 24, 6


def module(rate=(1, 2), segment=(4, 8), *, seed=0, **options):
    torch.manual_seed(seed)
    return DilatedAttention(WIDTH, HEADS, rate, segment, **options).double()


def rows(tokens, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, tokens, WIDTH, dtype=torch.float64, requires_grad=True)


def by_reference(layer, x):
    """The same with the reference backend and the projections apart."""
    q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in layer.qkv(x).chunk(3, 2))
    out = attend(q, k, v, layer.pattern, backend="reference")
    return layer.out(out.transpose(1, 2).flatten(2))


def torchscale(layer, x, segments, rates, causal):
    """The released algorithm: fold into segments, thin out each head group, attend, scatter back, mix."""
    batch, tokens, _ = x.shape
    q, k, v = (part.unflatten(2, (HEADS, -1)) for part in layer.qkv(x).chunk(3, 2))  # [B, N, H, D]
    outs, sums = [], []
    for segment, rate in zip(segments, rates, strict=True):
        length = min(segment, tokens)
        group = math.ceil(HEADS / rate)
        out = torch.zeros(batch, tokens, HEADS, q.shape[3], dtype=x.dtype)
        lse = torch.full((batch, tokens, HEADS), -1e8, dtype=x.dtype)
        for head in range(HEADS):
            for start in range(0, tokens, length):
                kept = torch.arange(start + head // group, start + length, rate)
                score = q[:, kept, head] @ k[:, kept, head].mT / math.sqrt(q.shape[3])
                if causal:
                    score = score.masked_fill(torch.ones(len(kept), len(kept)).triu(1).bool(), -math.inf)
                lse[:, kept, head] = score.logsumexp(-1).detach()
                out = out.index_put(
                    (torch.arange(batch)[:, None], kept, torch.tensor(head)), score.softmax(-1) @ v[:, kept, head]
                )
        outs.append(out)
        sums.append(lse)
    shares = torch.stack(sums).softmax(0)[..., None]
    return layer.out((torch.stack(outs) * shares).sum(0).flatten(2))


def gradients(out, inputs):
    torch.manual_seed(2)
    return torch.autograd.grad((out * torch.randn_like(out)).sum(), inputs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("segments", "rates"), [((8,), (1,)), ((8,), (2,)), ((4, 8, 24), (1, 2, 3)), ((8, 24), (4, 4)), ((12, 48), (2, 6))]
)
def test_compatible_with_torchscale_in_numbers_and_gradients(segments, rates, causal):
    x = rows(24)
    layer = module(rates, segments, causal=causal, compatible="torchscale")
    inputs = (x, *layer.parameters())
    ours, theirs = layer(x), torchscale(layer, x, segments, rates, causal)
    assert torch.allclose(ours, theirs, atol=1e-12)
    for mine, other in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert torch.allclose(mine, other, atol=1e-11)


def test_the_exact_module_gives_torchscales_numbers_and_the_true_gradient():
    x, layer = rows(24), module((1, 2, 3), (4, 8, 24))
    released = torchscale(layer, x, (4, 8, 24), (1, 2, 3), causal=False)
    assert torch.allclose(layer(x), released, atol=1e-12)
    ours = gradients(layer(x), (x,))[0]
    assert torch.allclose(ours, gradients(by_reference(layer, x), (x,))[0], atol=1e-12)
    assert not torch.allclose(ours, gradients(released, (x,))[0], atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 23, 31])
@pytest.mark.parametrize("offsets", ["grouped", "interleaved"])
@pytest.mark.parametrize("causal", [False, True])
def test_any_length_is_exact(tokens, offsets, causal):
    x, layer = rows(tokens), module((1, 3), (5, 8), offsets=offsets, causal=causal)
    assert torch.allclose(layer(x), by_reference(layer, x), atol=1e-12)


@pytest.mark.parametrize("tokens", [48, 53])
def test_some_segments_at_a_time_give_the_same_output_and_gradients(tokens, monkeypatch):
    monkeypatch.setattr("longspan.nn.cut", lambda pattern, tokens: cut(pattern, tokens, 16))
    computed = []
    monkeypatch.setattr(
        "longspan.nn.attend", lambda q, *given, **named: computed.append(q.shape[2]) or attend(q, *given, **named)
    )
    x, layer = rows(tokens), module(causal=True)
    inputs = (x, *layer.parameters())
    whole = layer(x)
    assert computed == [tokens]
    with torch.no_grad():
        assert torch.allclose(layer(x), whole, atol=1e-12)
    assert max(computed[1:]) == 16
    layer.checkpoint = True
    for mine, other in zip(gradients(layer(x), inputs), gradients(whole, inputs), strict=True):
        assert torch.allclose(mine, other, atol=1e-11)
    assert max(computed[1:]) == 16


def test_no_token_and_no_row_give_none():
    assert module()(torch.zeros(2, 0, WIDTH).double()).shape == (2, 0, WIDTH)
    assert module()(torch.zeros(0, 5, WIDTH).double()).shape == (0, 5, WIDTH)


def test_numbers_and_lists_are_taken():
    assert module(2, 8).pattern.branches == ((8, 2),)
    assert module(1, [4, 8]).pattern.branches == ((4, 1), (8, 1))
    assert module([1, 2], 8).pattern.branches == ((8, 1), (8, 2))


def test_padding_is_never_seen():
    x, layer = rows(11), module(use_xpos=True, use_rel_pos_bias=True)
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[0, 7:] = True
    other = torch.where(padding[..., None], math.nan, x)
    expected = layer(x, padding)
    assert torch.allclose(layer(other, padding)[~padding], expected[~padding], atol=1e-12)
    assert torch.allclose(layer(x[:1, :7]), expected[:1, :7], atol=1e-12)
    assert layer(x, torch.ones(2, 11, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"use_xpos": True}, {"use_rel_pos_bias": True}])
def test_a_causal_module_never_sees_ahead(options):
    x, layer = rows(17), module(causal=True, **options)
    changed = torch.cat((x[:, :9], torch.randn_like(x[:, 9:])), 1)
    assert torch.allclose(layer(changed)[:, :9], layer(x)[:, :9], atol=1e-12)
    assert not torch.allclose(layer(changed)[:, 9:], layer(x)[:, 9:])


@pytest.mark.parametrize("options", [{}, {"use_xpos": True}, {"use_rel_pos_bias": True}, {"causal": True}])
def test_gradients_are_those_of_differences(options):
    layer, x = module(**options), rows(9, batch=1)
    assert torch.autograd.gradcheck(layer, x)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


def test_bidirectional_xpos_only_turns():
    x = rows(20)
    near, far = module(1, 20, use_xpos=True), module(1, 20, use_xpos=True, causal=True)
    assert near.rotary.decay_base is None and far.rotary.decay_base == 512
    shifted = torch.cat((torch.zeros_like(x[:, :4]), x), 1)
    padding = torch.arange(24).expand(2, -1) < 4
    segments = module(1, 24, use_xpos=True)
    assert torch.allclose(segments(shifted, padding)[:, 4:], near(x), atol=1e-12)


def test_more_tokens_than_xpos_can_hold_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"beyond 255 tokens in one pass; got 300.*xpos_scale_base of at least 3"):
        module(1, 8, use_xpos=True, causal=True, xpos_scale_base=2.0)(rows(300))
    assert module(1, 8, use_xpos=True, causal=True, xpos_scale_base=3.0)(rows(300)).isfinite().all()


def test_dropout_works_in_training_only():
    x, layer = rows(16), module(dropout=0.5)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    assert not torch.allclose(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_it_takes_the_place_of_a_layer_in_a_network():
    network = nn.Sequential(nn.Linear(WIDTH, WIDTH), DilatedAttention(WIDTH, HEADS, 2, 8, 0.1, True), nn.GELU())
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    x = torch.randn(2, 19, WIDTH)
    before = F.mse_loss(network.eval()(x), x)
    F.mse_loss(network.train()(x), x).backward()
    optimizer.step()
    assert F.mse_loss(network.eval()(x), x) < before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DilatedAttention(10, 3, 1, 4), "multiple of num_heads"),
        (lambda: DilatedAttention(9, 3, 1, 4, use_xpos=True), "must be even"),
        (lambda: DilatedAttention(12, 3, [1, 2], [4, 8, 16]), "as many dilations as segment lengths"),
        (lambda: DilatedAttention(12, 3, 8, 4), "a dilation must not exceed its segment length"),
        (lambda: DilatedAttention(12, 3, 0, 4), "at least 1"),
        (lambda: DilatedAttention(12, 3, [], []), "at least one"),
        (lambda: DilatedAttention(12, 3, 1, 4, dropout=1.0), "0 <= dropout < 1"),
        (lambda: DilatedAttention(12, 3, 1, 4, offsets="paper"), "'interleaved'"),
        (lambda: DilatedAttention(12, 3, 1, 4, compatible="kyegomez"), "None or 'torchscale'"),
        (lambda: DilatedAttention(12, 3, 1, 4, use_rel_pos_bias=True, compatible="torchscale"), "no relative bias"),
    ],
)
def test_what_cannot_be_made_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_read_is_refused():
    layer = module()
    with pytest.raises(ValueError, match=r"x must be \[B, N, 24\]; got \[2, 5, 25\]"):
        layer(torch.zeros(2, 5, 25))
    with pytest.raises(ValueError, match=r"key_padding_mask must be Bool\[2, 5\]"):
        layer(rows(5), torch.zeros(2, 5))


def test_compatible_refuses_where_the_released_code_is_wrong():
    layer = module(2, 8, compatible="torchscale")
    with pytest.raises(ValueError, match=r"N to be a multiple of each segment.*N=12, segment 8"):
        layer(rows(12))
    with pytest.raises(ValueError, match="takes no padding"):
        layer(rows(8), torch.ones(2, 8, dtype=torch.bool))
    assert layer(rows(8), torch.zeros(2, 8, dtype=torch.bool)).isfinite().all()
    with pytest.raises(ValueError, match="segments of their dilations"):
        module(3, 8, compatible="torchscale")(rows(16))
