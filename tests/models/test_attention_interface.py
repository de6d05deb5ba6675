"""Patterns in transformers' own models: equal to eager attention with the mask written out, and to itself in steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    XLNetConfig,
    XLNetModel,
)

from longspan import accelerate
from longspan.attention import DilatedSegments, Full, GlobalKeys, Pattern, SlidingWindow
from longspan.models.attention_interface import set_attention

VOCABULARY, HEADS, LAYERS = 50, 4, 2
SEGMENTS = DilatedSegments(((8, 1), (16, 2)), heads=HEADS, causal=True)
CAUSAL = {
    "window": SlidingWindow(5, 0),
    "dilated": SlidingWindow(3, 0, dilation=(1, 1, 2, 3)),
    "segments": SEGMENTS,
    "full": Full(causal=True),
    "per layer": (SlidingWindow(2, 0), SlidingWindow(4, 0, dilation=2)),
}


def gpt2(**options) -> PreTrainedModel:
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None, **options))


def llama(kind=LlamaForCausalLM, config=LlamaConfig, **options) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    tokens = {"vocab_size": VOCABULARY, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 64}
    return kind(config(**sizes, **tokens, num_key_value_heads=2, **options))


def bert(**options) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=64, **options))


DECODERS = {"gpt2": gpt2, "llama": llama}


def pair(make) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights with eager attention and to be given a pattern."""
    torch.manual_seed(0)
    eager = make(attn_implementation="eager").eval()
    other = make().eval()
    other.load_state_dict(eager.state_dict())
    return eager, other


def added(pattern: Pattern, token_mask: Tensor) -> Tensor:
    """What eager attention adds to its scores: [B, H, N, N]. Padded rows see the first token, to stay finite."""
    batch, tokens = token_mask.shape
    index = torch.arange(tokens)
    count = pattern.count(
        torch.arange(batch).view(-1, 1, 1, 1), torch.arange(HEADS).view(-1, 1, 1), index[:, None], index
    )
    count = (count * token_mask[:, None, None, :]).expand(batch, HEADS, tokens, tokens).float()
    blind = count.sum(-1, keepdim=True) == 0
    return (count + blind * (index == 0)).log().clamp_min(torch.finfo(torch.float32).min)


def ids(tokens: int = 37, batch: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


def padded(kind: str, tokens: int = 37) -> Tensor:
    mask = torch.ones(2, tokens, dtype=torch.bool)
    if kind == "right":
        mask[1, 25:] = False
    if kind == "left":
        mask[1, :12] = False
    return mask


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["window", "dilated", "segments", "full"])
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_equals_eager_attention_with_the_mask_written_out(family: str, name: str, padding: str):
    eager, ours = pair(DECODERS[family])
    pattern, token_mask = CAUSAL[name], padded(padding)
    set_attention(ours, pattern)
    positions = (token_mask.cumsum(1) - 1).clamp_min(0)
    asked = {"input_ids": ids(), "position_ids": positions, "use_cache": False}
    expected = eager(**asked, attention_mask=added(pattern, token_mask)).logits
    if name == "segments" and padding == "left":
        with pytest.raises(NotImplementedError, match="padding must stand on the right"):
            ours(**asked, attention_mask=token_mask)
        return
    given = None if padding == "none" else token_mask
    out = ours(**asked, attention_mask=given).logits
    torch.testing.assert_close(out[token_mask], expected[token_mask], rtol=0, atol=2e-5)
    gradients = []
    for model, logits in ((eager, expected), (ours, out)):
        gradients.append(torch.autograd.grad(logits[token_mask].square().sum(), list(model.parameters())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("pattern", [SlidingWindow(4, 3), SlidingWindow(4, 0), Full()], ids=repr)
def test_an_encoder_equals_eager_attention_with_the_mask_written_out(pattern: Pattern, padding: str):
    eager, ours = pair(bert)
    token_mask = padded(padding)
    set_attention(ours, pattern)
    expected = eager(ids(), attention_mask=added(pattern, token_mask)).logits
    out = ours(ids(), attention_mask=token_mask).logits
    torch.testing.assert_close(out[token_mask], expected[token_mask], rtol=0, atol=2e-5)


def test_layers_may_differ():
    eager, ours = pair(llama)
    set_attention(ours, CAUSAL["per layer"])
    hidden = ours(ids(), output_hidden_states=True).hidden_states
    first, second = (ours.model.layers[number] for number in range(LAYERS))
    assert first.self_attn._longspan_pattern[1] == CAUSAL["per layer"][0]
    assert second.self_attn._longspan_pattern[1] == CAUSAL["per layer"][1]
    expected = eager(ids(), attention_mask=added(CAUSAL["per layer"][0], padded("none")), output_hidden_states=True)
    torch.testing.assert_close(hidden[1], expected.hidden_states[1], rtol=0, atol=1e-5)
    assert not torch.allclose(hidden[2], expected.hidden_states[2], atol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["window", "dilated", "segments", "per layer"])
@pytest.mark.parametrize("family", DECODERS)
def test_every_decoded_token_is_that_of_the_full_forward(family: str, name: str, cache: str):
    _, model = pair(DECODERS[family])
    set_attention(model, CAUSAL[name])
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    prompt = ids(9)
    with torch.no_grad():
        done = model.generate(
            prompt, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
        )
        full = model(done.sequences, use_cache=False).logits
    for step, logits in enumerate(done.logits):
        torch.testing.assert_close(logits, full[:, prompt.shape[1] - 1 + step], rtol=0, atol=2e-5)


def test_generation_from_prompts_padded_on_the_left_equals_each_alone():
    _, model = pair(llama)
    set_attention(model, SlidingWindow(6, 0))
    prompt, token_mask = ids(12), padded("left", 12)
    token_mask[1, :5], token_mask[1, 5:] = False, True
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    both = model.generate(prompt, attention_mask=token_mask, **options)
    alone = model.generate(prompt[1:, 5:], **options)
    assert torch.equal(both[1, 5:], alone[0])


def test_a_prompt_may_come_in_pieces():
    _, model = pair(llama)
    set_attention(model, CAUSAL["dilated"])
    first = model(ids()[:, :20], use_cache=True)
    rest = model(ids()[:, 20:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, model(ids()).logits[:, 20:], rtol=0, atol=1e-5)


def test_a_saved_model_keeps_its_pattern(tmp_path):
    _, model = pair(gpt2)
    set_attention(model, CAUSAL["per layer"])
    model.save_pretrained(tmp_path)
    again = set_attention(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits)
    named = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="longspan").eval()
    torch.testing.assert_close(named(ids()).logits, model(ids()).logits)


def test_it_can_be_undone_and_changed():
    eager, model = pair(llama)
    set_attention(model, SlidingWindow(3, 0))
    narrow = model(ids()).logits
    set_attention(model, SlidingWindow(9, 0))
    assert not torch.allclose(model(ids()).logits, narrow)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids()).logits, eager(ids()).logits, rtol=0, atol=1e-5)


def test_without_a_pattern_the_name_alone_means_the_models_own_attention():
    for make in (*DECODERS.values(), bert):
        eager, model = pair(make)
        model.set_attn_implementation("longspan")
        torch.testing.assert_close(model(ids()).logits, eager(ids()).logits, rtol=0, atol=1e-5)


def test_dropout_drops_in_training_only():
    _, model = pair(lambda **options: llama(attention_dropout=0.5, **options))
    set_attention(model, SlidingWindow(5, 0))
    once = model(ids()).logits
    torch.testing.assert_close(model(ids()).logits, once, rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(ids()).logits, once, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "pattern", "error", "message"),
    [
        (llama, SlidingWindow(4, 4), ValueError, r"looks ahead, but a llama is causal: give .*SlidingWindow\(512, 0\)"),
        (gpt2, Full(), ValueError, "looks ahead, but a gpt2 is causal"),
        (gpt2, DilatedSegments(((8, 1),), heads=HEADS), ValueError, "looks ahead"),
        (
            gpt2,
            (SlidingWindow(4, 0), SlidingWindow(4, 1)),
            ValueError,
            r"SlidingWindow\(before=4, after=1.*looks ahead",
        ),
        (gpt2, (SlidingWindow(4, 0),), ValueError, "one pattern for all layers or 2, one for each; got 1"),
        (bert, SlidingWindow(4, 4, dilation=(1, 2)), ValueError, "2 dilations but q has 4 heads"),
        (bert, DilatedSegments(((8, 1),), heads=3), ValueError, "made for 3 heads but q has 4"),
        (bert, GlobalKeys(torch.ones(1, 9, dtype=torch.bool)), NotImplementedError, "global keys mark places of one"),
        (bert, 512, ValueError, "must be a longspan.attention Pattern"),
        (bert, "window", ValueError, "must be a longspan.attention Pattern"),
        (bert, None, ValueError, "config has no longspan_pattern"),
        (lambda: accelerate(bert()), SlidingWindow(4, 4), NotImplementedError, "longspan's own encoder already"),
        (lambda: llama(MistralForCausalLM, MistralConfig), SlidingWindow(4, 0), NotImplementedError, "of its own"),
        (lambda: gpt2(add_cross_attention=True), SlidingWindow(4, 0), NotImplementedError, "cross-attention"),
        (torch.nn.Identity, SlidingWindow(4, 0), ValueError, "takes a transformers model"),
    ],
)
def test_what_a_model_cannot_honor_is_refused(make, pattern, error, message: str):
    with pytest.raises(error, match=message):
        set_attention(make(), pattern)


def test_models_that_do_not_dispatch_or_have_two_halves_are_refused():
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 64}
    with pytest.raises(NotImplementedError, match="does not dispatch"):
        set_attention(XLNetModel(XLNetConfig(**sizes)), SlidingWindow(4, 4))
    sizes = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, d_model=16, **sizes))
    with pytest.raises(NotImplementedError, match="cross-attention"):
        set_attention(bart, SlidingWindow(4, 0))


def test_calls_that_it_cannot_compute_are_refused():
    _, model = pair(llama)
    set_attention(model, SlidingWindow(5, 0))
    with pytest.raises(NotImplementedError, match=r"takes attention_mask as \[B, N\]"):
        model(ids(), attention_mask=added(SlidingWindow(5, 0), padded("none")))
    with pytest.raises(NotImplementedError, match="packed sequences"):
        model(ids(6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2), use_cache=False)


def test_a_pattern_written_into_the_config_by_hand_is_checked_too():
    _, model = pair(llama)
    model.config.longspan_pattern = SlidingWindow(4, 4).to_dict()
    model.set_attn_implementation("longspan")
    with pytest.raises(ValueError, match="looks ahead"):
        model(ids())
