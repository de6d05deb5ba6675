"""Decoding with a cache: equal to the full forward at every step, and bounded."""

import pytest
import torch
from tests.models.tiny_language_models import OWN, POSITIONS, some_ids, tiny_model

from longspan.attention import DilatedSegments, Full, SlidingWindow
from longspan.models import decoder_cache
from longspan.models.decoder_cache import still_seen

TOKENS = 56  # several segments and windows


def decode(model, ids, steps, mask=None):
    """Logits of all tokens, given `steps` tokens at a time, and the cache after them."""
    parts, cache, done = [], None, 0
    with torch.no_grad():
        for step in steps:
            seen = None if mask is None else mask[:, : done + step]
            outputs = model(ids[:, done : done + step], attention_mask=seen, past_key_values=cache, use_cache=True)
            parts.append(outputs.logits)
            cache, done = outputs.past_key_values, done + step
    assert done == ids.shape[1]
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", OWN)
def test_every_step_equals_the_full_forward(family, positions):
    model, ids = tiny_model(family, positions=positions), some_ids(2, TOKENS)
    full = model(ids, use_cache=False).logits
    for steps in ([1] * TOKENS, [5, 1, 9, 24, 1, 2, 14]):
        assert torch.allclose(decode(model, ids, steps)[0], full, atol=1e-11)


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("prompt", [1, 6, 7, 23, 24, 25])
def test_prompts_of_any_length_go_on_rightly(family, prompt):
    model, ids = tiny_model(family, dtype=torch.float32), some_ids(1, TOKENS)
    full = model(ids, use_cache=False).logits
    found, _ = decode(model, ids, [prompt, *[1] * (TOKENS - prompt)])
    assert torch.allclose(found, full, atol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("side", ["left", "right", "both and between"])
def test_padding_changes_nothing(family, positions, side):
    model, ids = tiny_model(family, positions=positions), some_ids(2, 40)
    full = model(ids, use_cache=False).logits
    mask = torch.ones(2, 60, dtype=torch.long)
    empty = {"left": [*range(20)], "right": [*range(40, 60)], "both and between": [0, 1, *range(20, 35), 57, 58, 59]}
    mask[0, empty[side]] = 0
    mask[1, 40:] = 0
    padded = torch.zeros_like(mask).masked_scatter(mask.bool(), ids)
    together = model(padded, attention_mask=mask, use_cache=False).logits
    assert torch.allclose(together[mask.bool()], full.flatten(0, 1), atol=1e-11)
    stepwise, _ = decode(model, padded, [13, 1, 1, 20, 15, *[1] * 10], mask)
    assert torch.allclose(stepwise[mask.bool()], full.flatten(0, 1), atol=1e-11)


@pytest.mark.parametrize("family", OWN)
def test_rows_of_padding_only_stay_finite(family):
    model, ids = tiny_model(family), some_ids(2, 20)
    mask = torch.tensor([[0] * 20, [1] * 20])
    assert model(ids, attention_mask=mask).logits.isfinite().all()
    assert decode(model, ids, [5, 1, 14], mask)[0].isfinite().all()


@pytest.mark.parametrize(
    ("family", "bounds"),
    [
        ("longformer_lm", (3, 10, 24)),  # windows times dilations
        ("longnet", (6 + 5 + 8,) * 3),
        ("longnet, no branch keeps all", (4 + 6,) * 3),
    ],
)
def test_the_cache_is_bounded(family, bounds):
    model, ids = tiny_model(family), some_ids(1, 300)
    for steps in ([*[1] * 200, 100], [200, *[1] * 100]):
        _, cache = decode(model, ids, steps)
        assert cache.get_seq_length() == 300
        for layer, bound in zip(cache.layers, bounds, strict=True):
            assert layer.keys.shape[2] == layer.values.shape[2] <= bound + 1 + 64


@pytest.mark.parametrize("pattern", [
    SlidingWindow(4, 0), SlidingWindow(3, 0, (1, 1, 2, 2)), Full(causal=True),
    DilatedSegments(((5, 1), (8, 3), (20, 4)), 4, causal=True),
    DilatedSegments(((6, 2), (12, 5)), 4, causal=True, offsets="interleaved"),
])  # fmt: skip
def test_what_is_forgotten_is_never_seen_again(pattern):
    tokens = torch.arange(61)
    seen = pattern.count(
        torch.tensor(0), torch.arange(4).view(-1, 1, 1), tokens.view(1, -1, 1), tokens.view(1, 1, -1)
    ).expand(4, 61, 61)
    for end in range(1, 60):
        later = seen[:, end:, :end].bool().any(1)  # [H, keys]
        kept = still_seen(pattern, torch.tensor(0), torch.arange(4)[:, None], tokens[None, :end], torch.tensor(end))
        assert not (later & ~kept).any()


def test_gradients_pass_through_the_new_tokens():
    model, ids = tiny_model("longnet"), some_ids(1, 30)
    _, cache = decode(model, ids[:, :20], [20])
    logits = model(ids[:, 20:], past_key_values=cache).logits
    assert torch.allclose(logits, model(ids).logits[:, 20:], atol=1e-11)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", OWN)
def test_decoding_goes_on_where_one_pass_would_overflow(family):
    model, ids = tiny_model(family, xpos_scale_base=0.5), some_ids(1, 150)
    with pytest.raises(ValueError, match=r"overflows beyond 63 tokens in one pass; got 150"):
        model(ids)
    assert decode(model, ids, [50, *[1] * 40, 60])[0].isfinite().all()
    exact = tiny_model(family, xpos_scale_base=1.25)  # in one pass up to 159, and the origin moves after 40
    full = exact(ids, use_cache=False).logits
    assert torch.allclose(decode(exact, ids, [*[1] * 100, 50])[0], full, atol=1e-10)
    assert torch.allclose(decode(exact, ids, [50, *[1] * 20, 60, 20])[0], full, atol=1e-10)


def test_float32_decodes_beyond_the_span_as_a_later_start_does():
    # Two layers that look back 8 and 16 tokens: the last 60 tokens decide.
    model = tiny_model(
        "longformer_lm", dtype=torch.float32, num_hidden_layers=2, windows=(8, 16), dilations=1, xpos_scale_base=2.0
    )
    ids = some_ids(1, 300)
    stepwise, cache = decode(model, ids, [100, *[1] * 100, 50, 50])
    assert cache.origin > 200
    assert torch.allclose(stepwise[:, -30:], model(ids[:, -60:]).logits[:, -30:], atol=1e-5)


def test_beams_take_their_cache_along():
    model, ids = tiny_model("longnet"), some_ids(3, 50)
    _, cache = decode(model, ids[:, :30], [30])
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    with torch.no_grad():
        found = model(ids[order][:, 30:], past_key_values=cache).logits
        assert torch.allclose(found, model(ids[order], use_cache=False).logits[:, 30:], atol=1e-11)
        _, cache = decode(model, ids[:, :30], [30])
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 4]))
        rows = torch.tensor([0, 2])
        found = model(ids[rows][:, 30:], past_key_values=cache).logits
        assert torch.allclose(found, model(ids[rows], use_cache=False).logits[:, 30:], atol=1e-11)


def test_a_cache_can_be_emptied_but_not_turned_back():
    model, ids = tiny_model("longformer_lm"), some_ids(1, 20)
    first, cache = decode(model, ids, [20])
    cache.crop(0)
    with pytest.raises(NotImplementedError, match="has forgotten"):
        cache.crop(-3)
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        assert torch.allclose(model(ids, past_key_values=cache).logits, first, atol=1e-12)


def test_a_cache_that_does_not_fit_is_refused():
    model = tiny_model("longformer_lm")
    _, cache = decode(model, some_ids(2, 9), [9])
    with pytest.raises(ValueError, match="holds 2 rows of a batch, but 3 came"):
        model(some_ids(3, 1), past_key_values=cache)
    model.set_windows(20)
    with pytest.raises(ValueError, match="made for other patterns"):
        model(some_ids(2, 1), past_key_values=cache)


@pytest.mark.parametrize("family", OWN)
def test_many_tokens_beside_a_cache_are_computed_in_parts(family, monkeypatch):
    model, ids = tiny_model(family, positions="bucketed"), some_ids(2, 40)
    full = model(ids, use_cache=False).logits
    monkeypatch.setattr(decoder_cache, "_MAX_SCORES", 500)
    assert torch.allclose(decode(model, ids, [10, 30])[0], full, atol=1e-11)
