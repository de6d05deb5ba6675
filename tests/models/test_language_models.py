"""LongNet and the Longformer language model as transformers sees them: loss, training, directories, generate()."""

import math

import pytest
import torch
import torch.nn.functional as F
from tests.models.tiny_language_models import CLASSES, OWN, POSITIONS, SIZES, some_ids, tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from longspan import LongformerForCausalLM, LongformerLMConfig, LongNetConfig, LongNetForCausalLM, LongNetModel
from longspan.attention import SlidingWindow
from longspan.models.longformer_lm import LongformerLMModel, growing_windows
from longspan.models.sequence import Place

FAMILIES = ("longformer_lm", "longnet")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_next_token(family):
    model, ids = tiny_model(family), some_ids(2, 20)
    labels = ids.clone()
    labels[0, :5] = -100
    outputs = model(ids, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(outputs.loss, expected)
    assert outputs.past_key_values is None
    summed = model(ids, labels=labels, num_items_in_batch=7).loss * 7
    assert torch.allclose(summed / (labels[:, 1:] != -100).sum(), expected)
    assert model(ids[:, :1], labels=ids[:, :1]).loss == 0


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_sees_ahead_and_every_weight_learns(family, positions):
    model, ids = tiny_model(family, positions=positions), some_ids(1, 40)
    changed = ids.clone()
    changed[:, 25:] = some_ids(1, 15, seed=2)
    assert torch.allclose(model(changed).logits[:, :25], model(ids).logits[:, :25], atol=1e-12)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("positions", ["relative", "bucketed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family, positions):
    model, ids = tiny_model(family, positions=positions, dropout=0.0).train(), some_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    calls = []
    block = model.model.decoder.blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2  # once more in the backward pass
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-12), name


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_dropout_works_in_training_only(name):
    model, ids = tiny_model("longformer_lm", **{name: 0.5}), some_ids(1, 20)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)


def test_windows_change_in_place():
    model, ids = tiny_model("longformer_lm"), some_ids(1, 40)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    narrow = model(ids).logits
    model.set_windows((12, 16, 40))
    assert model.config.windows == (12, 16, 40)
    assert model.patterns[2] == SlidingWindow(40, 0, (1, 1, 3, 3))
    wide = model(ids).logits
    assert not torch.allclose(wide, narrow)
    other = LongformerForCausalLM(tiny_config("longformer_lm", windows=(12, 16, 40))).double().eval()
    other.load_state_dict(before)
    assert torch.allclose(other(ids).logits, wide, atol=1e-12)
    model.set_windows(5)
    assert model.config.windows == (5, 5, 5)
    with pytest.raises(ValueError, match="one for each of the 3 layers"):
        model.set_windows((1, 2))


def test_the_longformer_presets_are_the_papers():
    small, large = LongformerLMConfig.small(vocab_size=27), LongformerLMConfig.large()
    assert (small.num_hidden_layers, small.hidden_size, small.num_attention_heads) == (12, 512, 8)
    assert (large.num_hidden_layers, large.hidden_size, large.num_attention_heads) == (30, 512, 8)
    assert (small.windows[0], small.windows[-1], large.windows[0], large.windows[-1]) == (512, 8192, 512, 8192)
    assert small.dilations == (1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4)
    assert small.patterns[11] == SlidingWindow(8192, 0, (1, 1, 1, 1, 1, 1, 4, 4))
    assert LongformerLMConfig.tiny().windows == (64, 128, 256, 512)
    assert growing_windows(32, 512, 12) == tuple(sorted(growing_windows(32, 512, 12)))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_the_auto_classes_load(family, tmp_path):
    model, ids = tiny_model(family, positions="relative"), some_ids(1, 12)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    assert AutoConfig.from_pretrained(tmp_path).patterns == model.patterns


@pytest.mark.parametrize("family", OWN)
def test_generate_equals_generate_without_a_cache(family):
    model = tiny_model(family)
    ids = torch.cat((torch.zeros(1, 4, dtype=torch.long), some_ids(1, 7)), 1)
    both = torch.cat((ids, some_ids(1, 11, seed=3)))
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0}
    for how in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"num_beams": 2, "prefill_chunk_size": 3}):
        with_cache = model.generate(both, **options, **how)
        without = model.generate(both, **options, **{k: v for k, v in how.items() if "chunk" not in k}, use_cache=False)
        assert torch.equal(with_cache, without)
    torch.manual_seed(0)
    sampled = model.generate(both, **options, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    assert torch.equal(
        sampled, model.generate(both, **options, do_sample=True, num_return_sequences=2, use_cache=False)
    )
    alone = model.generate(ids[:, 4:], max_new_tokens=20, do_sample=False, pad_token_id=0)
    greedy = model.generate(both, **options, do_sample=False)
    assert torch.equal(greedy[0, 4:], alone[0])


def test_a_second_turn_goes_on_with_the_first_ones_cache():
    model, ids = tiny_model("longnet"), some_ids(1, 12)
    first = model.generate(ids, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    prompt = torch.cat((first.sequences, some_ids(1, 5, seed=4)), 1)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    again = model.generate(prompt, past_key_values=first.past_key_values, **options)
    assert torch.equal(again, model.generate(prompt, **options, use_cache=False))


def test_a_longnet_encoder_sees_both_sides():
    torch.manual_seed(0)
    model = LongNetModel(tiny_config("longnet")).double().eval()
    ids = some_ids(1, 12)
    outputs = model(ids, output_hidden_states=True)
    assert outputs.past_key_values is None and len(outputs.hidden_states) == 4
    changed = ids.clone()
    changed[:, 5] = 3 + (ids[:, 5] - 2) % 20
    assert not torch.allclose(model(changed).last_hidden_state[:, 4], outputs.last_hidden_state[:, 4])
    mask = torch.tensor([[0, 0, 0] + [1] * 12])
    padded = torch.cat((ids[:, :3], ids), 1)
    assert torch.allclose(
        model(padded, attention_mask=mask).last_hidden_state[:, 3:], outputs.last_hidden_state, atol=1e-12
    )
    with pytest.raises(ValueError, match="takes no past_key_values"):
        model(ids, past_key_values=model.new_cache())


def test_sub_ln_starts_as_torchscale_says():
    torch.manual_seed(0)
    model = LongNetForCausalLM(LongNetConfig.tiny(vocab_size=50))
    block, gain = model.model.decoder.blocks[0], math.sqrt(math.log(2 * 4))
    q, k, v = block.attention.qkv.weight.chunk(3)
    xavier = math.sqrt(6 / 512)  # the bound of a uniform distribution, 256 numbers in and out
    for weight, bound in [
        (q, xavier / math.sqrt(2)),
        (k, xavier / math.sqrt(2)),
        (v, gain * xavier / math.sqrt(2)),
        (block.attention.out.weight, gain * xavier),
        (block.ffn_in.weight, gain / math.sqrt(256)),
        (block.ffn_out.weight, gain / math.sqrt(1024)),
    ]:
        assert 0.98 * bound < weight.abs().max() <= bound
    assert not block.attention.qkv.bias.any()
    assert isinstance(block.attention.inner_norm, torch.nn.LayerNorm)
    assert block.inner_norm.normalized_shape == (1024,)


def test_deepnorm_scales_residuals_and_weights():
    torch.manual_seed(0)
    model = LongNetForCausalLM(LongNetConfig.tiny(vocab_size=50, subln=False, deepnorm=True)).eval()
    decoder, gain = model.model.decoder, (8 * 4) ** -0.25
    block = decoder.blocks[0]
    assert isinstance(decoder.final_norm, torch.nn.Identity)
    bound = gain * math.sqrt(6 / 512)
    assert 0.98 * bound < block.attention.out.weight.abs().max() <= bound
    x, now = torch.randn(1, 9, 256), decoder._describe(torch.zeros(1, 9, 256), Place(0, 9, None), None, True)
    pattern = decoder.patterns[0]
    alpha = 8**0.25
    between = block.attention_norm(alpha * x + block.attention(x, pattern, now))
    expected = block.ffn_norm(alpha * between + block.feed_forward(between))
    assert torch.allclose(block(x, pattern, now), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_near_float32(family):
    model, ids = tiny_model(family, dtype=torch.float32, positions="relative"), some_ids(1, 40)
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(ids).logits
    assert (rough.float() - exact).abs().max() < 0.15 * exact.abs().max()
    assert model.to(torch.bfloat16).generate(ids, max_new_tokens=4, pad_token_id=0).shape == (1, 44)


@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_trains_it(family, tmp_path):
    torch.manual_seed(0)
    model = CLASSES[family][1](tiny_config(family))
    text = torch.arange(64).remainder(7) + 3
    rows = [{"input_ids": text[i : i + 24], "labels": text[i : i + 24]} for i in range(32)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, learning_rate=3e-3, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    before = model.eval()(text[None], labels=text[None]).loss
    Trainer(model, arguments, train_dataset=rows).train()
    assert model.eval()(text[None], labels=text[None]).loss < 0.8 * before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LongNetConfig(segment_lengths=(8, 16), dilations=(1,)), "as many dilations as segment lengths"),
        (lambda: LongNetConfig(segment_lengths=(8,), dilations=(9,)), "must not exceed its segment length"),
        (lambda: LongNetConfig(offsets="paper"), "'interleaved'"),
        (lambda: LongNetConfig(deepnorm=True), "choose one of them"),
        (lambda: LongNetConfig(hidden_size=100), "multiple of the number of heads"),
        (lambda: LongNetConfig(positions="learned"), "xpos, rotary, relative, bucketed, none"),
        (lambda: LongNetConfig(dropout=1.0), "0 <= dropout < 1"),
        (lambda: LongNetConfig(hidden_act="gelp"), "unknown activation"),
        (lambda: LongformerLMConfig(windows=(1, 2)), "one for each of the 12 layers"),
        (lambda: LongformerLMConfig(windows=0), "whole number >= 1"),
        (lambda: LongformerLMConfig(dilations=0.5), "whole number >= 1"),
        (lambda: LongformerLMConfig(dilated_heads=9), "dilated_heads must lie between 0 and num_attention_heads, 8"),
        (lambda: LongformerLMConfig(num_hidden_layers=0), "num_hidden_layers of at least 1"),
        (lambda: LongformerLMConfig(hidden_size=24), "head width"),
        (lambda: growing_windows(8, 4, 3), "windows grow"),
        (lambda: LongNetForCausalLM(tiny_config("longnet", causal=False)), "must be causal"),
    ],
)
def test_what_cannot_be_made_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_read_is_refused():
    model, ids = tiny_model("longformer_lm"), some_ids(2, 9)
    with pytest.raises(ValueError, match=r"at least one token; got \[1, 0\]"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="either input_ids"):
        model()
    with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.29.*got 0 to 99"):
        model(torch.tensor([[0, 99]]))
    with pytest.raises(ValueError, match=r"= \[2, 9\]; got \[2, 8\]"):
        model(ids, attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"labels must be \[B, N\] = \[2, 9\]"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="got DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(ids, output_attentions=True)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    tiny_model("longformer_lm").save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="this checkpoint is a 'longformer_lm' model and LongNetConfig"):
        LongNetForCausalLM.from_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="belong to another configuration"):
        LongformerForCausalLM.from_pretrained(tmp_path / "lm", config=tiny_config("longformer_lm", hidden_size=64))
    with pytest.raises(ValueError, match="lacks 12 weights"):
        deeper = tiny_config("longformer_lm", num_hidden_layers=4, windows=4, dilations=1)
        LongformerForCausalLM.from_pretrained(tmp_path / "lm", config=deeper)
    assert isinstance(LongformerLMModel.from_pretrained(tmp_path / "lm"), LongformerLMModel)
    assert SIZES["vocab_size"] == 30
