"""Plans against counted operations, and against memory that is measured while small models run."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from tests.models.tiny import tiny_config
from tests.planning.measures import BRANCHES, SIZES, kept_bytes, longformer, longnet, loss_of, peak_bytes, some_ids
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from longspan import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetModel,
    LongspanForMaskedLM,
    LongspanForSequenceClassification,
    LongspanModel,
)
from longspan.attention import DilatedSegments, Pattern, attend
from longspan.attention.backends.tiled import attend_tiled_backward
from longspan.attention.patterns import pattern_to_parts
from longspan.models import sequence, trained_linear
from longspan.models.checkpoints import translate_config
from longspan.planning import plan, sizes_of
from longspan.planning.attention import Heads, Ranks, load_of
from longspan.training.curriculum import forward_operations


def encoder(family, kind, tokens, **changes):
    plain = {} if family == "modernbert" else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    windows = {"attention_window": [32, 32]} if family == "longformer" else {}
    config = tiny_config(family, **SIZES | plain | windows | {"max_position_embeddings": tokens + 2} | changes)
    return kind(translate_config(config))


MODELS = {
    "LongNet": lambda tokens: longnet(),
    "LongNet, narrow": lambda tokens: longnet(intermediate_size=64, subln=False, positions="rotary"),
    "LongNet encoder": lambda tokens: LongNetModel(LongNetConfig(**SIZES | BRANCHES)),
    "Longformer, many tokens to choose from": lambda tokens: longformer(vocab_size=512),
    "Longformer, dropout": lambda tokens: longformer(dropout=0.1, activation_dropout=0.1),
    "Longformer, relative positions": lambda tokens: longformer(positions="relative", relative_width=16),
    "Longformer, biases": lambda tokens: longformer(positions="bucketed"),
    "Longformer of 2020": lambda tokens: encoder("longformer", LongspanForMaskedLM, tokens),
    "BERT, a label": lambda tokens: encoder("bert", LongspanForSequenceClassification, tokens),
    "ModernBERT": lambda tokens: encoder("modernbert", LongspanForMaskedLM, tokens),
}


@pytest.fixture
def written_out(monkeypatch):
    """Products that torch's counter sees. Attention computes every pair, so it is compared where all are seen."""
    monkeypatch.setattr(trained_linear, "one_dnn_is_faster", lambda: False)
    monkeypatch.setattr(
        sequence, "attend", lambda *rows, **options: attend(*rows, **options | {"backend": "reference"})
    )


FULL = {
    "LongNet, one segment": lambda tokens: LongNetModel(
        LongNetConfig(**SIZES, segment_lengths=(tokens,), dilations=(1,))
    ),
    "BERT": lambda tokens: encoder("bert", LongspanForMaskedLM, tokens),
    "RoBERTa": lambda tokens: encoder("roberta", LongspanModel, tokens),
}


@pytest.mark.parametrize("name", FULL)
def test_operations_are_those_that_torch_counts_where_all_keys_are_seen(name, written_out):
    tokens = 512  # enough for attention to weigh as much as the projections
    model, ids = FULL[name](tokens), some_ids(tokens)
    found = plan(model, tokens=tokens, devices=1, mode="training", precision="fp32")
    forward = sum(layer.forward_operations for layer in found.layers) + found.head_operations
    with FlopCounterMode(display=False) as counter:
        outputs = model(ids)
    assert counter.get_total_flops() == pytest.approx(forward, rel=0.1)
    state = outputs[0]
    with FlopCounterMode(display=False) as counter:
        state.sum().backward()
    # Written out, attention keeps its probabilities; what we plan computes them again, one more product of two.
    again = 0.5 * sum(4 * model.config.hidden_size * tokens**2 for _ in found.layers)
    assert counter.get_total_flops() + again == pytest.approx(found.operations - forward, rel=0.1)


def test_the_backward_pass_of_attention_is_five_products_to_two():
    """Without a causal mask a step of segments holds kept keys only, so what is computed is what the pattern counts."""
    heads, width, tokens = 4, 16, 192
    pattern: Pattern = DilatedSegments(((48, 1), (96, 2)), heads)
    rows = [torch.randn(1, heads, tokens, width, dtype=torch.float64) for _ in range(5)]
    text, tensors = pattern_to_parts(pattern)
    with FlopCounterMode(display=False) as counter:
        attend_tiled_backward(
            rows[0], None, *rows[1:], torch.zeros(1, heads, tokens), text, tensors, None, None, None, 0, 0.25, 0.0
        )
    pairs = load_of(pattern, Ranks(tokens, 1), 0, Heads(heads, width, 8)).pairs
    assert counter.get_total_flops() == 2.5 * 4 * width * pairs


@pytest.mark.parametrize("model", [longnet(), longformer()], ids=["LongNet", "Longformer"])
def test_operations_of_language_models_agree_with_those_of_curricula(model):
    tokens = 256
    found = plan(model, tokens=tokens, devices=1, mode="inference")
    assert found.operations == pytest.approx(tokens * forward_operations(model, tokens), rel=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_what_is_kept_and_held_at_the_peak(name):
    tokens = 1024 if name in ("BERT, a label", "ModernBERT") else 4096
    torch.manual_seed(0)
    model, ids = MODELS[name](tokens), some_ids(tokens)
    memory = plan(model, tokens=tokens, devices=1, precision="fp32").memory
    assert kept_bytes(lambda: loss_of(model, ids), model) == pytest.approx(memory.kept, rel=0.1)
    assert memory.weights == memory.gradients == memory.optimizer / 2 == 4 * sum(w.numel() for w in model.parameters())
    loss_of(model, ids).backward()  # makes the gradients, and what libraries hold from their first call on
    for mode in ("training", "checkpointing"):
        if mode == "checkpointing":
            model.activation_checkpointing_enable()
        memory = plan(model, tokens=tokens, devices=1, mode=mode, precision="fp32").memory
        measured = peak_bytes(lambda: loss_of(model, ids).backward())
        assert memory.kept + memory.working == pytest.approx(measured, rel=0.1), mode
    memory = plan(model, tokens=tokens, devices=1, mode="inference", precision="fp32").memory
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        measured = peak_bytes(lambda: model.eval()(ids, **options))
    assert memory.kept == 0 and memory.working == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: longnet(num_hidden_layers=6),
        lambda: encoder("longformer", LongspanForMaskedLM, 4096, num_hidden_layers=6, attention_window=[32] * 6),
    ],
    ids=["a decoder", "an encoder"],
)
def test_reading_takes_memory_for(make):
    model = make().eval()
    memory = plan(model, tokens=4096, devices=1, mode="inference", precision="fp32").memory
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        model(some_ids(64), **options)
        measured = peak_bytes(lambda: model(some_ids(4096), **options))
    assert memory.total - memory.weights == pytest.approx(measured, rel=0.1)


def test_bf16_keeps_half_of_what_autocast_narrows():
    model, ids = longnet(), some_ids(4096)
    with torch.autocast("cpu", torch.bfloat16):
        measured = kept_bytes(lambda: loss_of(model, ids), model)
    memory = plan(model, tokens=4096, devices=1, precision="bf16").memory
    weights = sum(weight.numel() for weight in model.parameters())
    copies = memory.weights - 4 * weights  # which autocast makes of matrices
    assert 0 < copies < 2 * weights
    assert memory.kept + copies == pytest.approx(measured, rel=0.1)


def test_the_smallest_number_of_devices_fits_and_one_less_does_not():
    sizes = sizes_of(longnet())
    make = partial(plan, sizes, tokens=2**20, device_memory=2**28, precision="fp32")
    found = make(devices=2)
    assert found.fits is False and found.smallest_devices is not None and found.smallest_devices > 2
    assert make(devices=found.smallest_devices).fits
    assert not make(devices=found.smallest_devices - 1).fits
    assert make(devices=2, mode="checkpointing").smallest_devices < found.smallest_devices
    assert plan(sizes, tokens=64, devices=1, device_memory=1e5).smallest_devices is None  # less than the weights


def test_sharded_weights_let_more_devices_hold_larger_models():
    sizes = sizes_of(longnet(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8))
    make = partial(plan, sizes, tokens=2**16, devices=16, device_memory=2**30, mode="checkpointing")
    whole, sharded = make(), make(shard_weights=True)
    assert whole.smallest_devices is None and sharded.smallest_devices is not None
    assert sharded.memory.optimizer == whole.memory.optimizer / 16
    assert whole.reduced_bytes < sharded.reduced_bytes < 1.5 * whole.reduced_bytes
    assert plan(sizes, tokens=64, devices=1, shard_weights=True).reduced_bytes == 0
    assert any("bf16 copies" in note for note in make(mode="training", shard_weights=True).notes)


def test_checkpointing_computes_and_sends_again():
    sizes = sizes_of(longnet())
    once, again, reads = (
        plan(sizes, tokens=1000, devices=4, mode=mode) for mode in ("training", "checkpointing", "inference")
    )
    for first, second, read in zip(once.layers, again.layers, reads.layers, strict=True):
        assert second.backward_operations == first.backward_operations + first.forward_operations
        assert second.backward_bytes == first.backward_bytes + first.forward_bytes
        assert (read.forward_operations, read.backward_operations) == (first.forward_operations, 0)
        assert (read.forward_bytes, read.backward_bytes) == (first.forward_bytes, 0)
    assert once.memory.kept > again.memory.kept > reads.memory.kept == reads.reduced_bytes == 0


def test_the_busiest_device_sets_the_times():
    found = plan(
        longnet(segment_lengths=(64, 1024), dilations=(1, 1)),
        tokens=1024,
        devices=4,
        operations_per_second=1e9,
        bytes_per_second=1e6,
    )
    assert found.most_operations > 1.05 * found.operations  # causal: the last one reads most
    assert found.computing_seconds == pytest.approx(found.most_operations / 1e9)
    assert found.sending_seconds == pytest.approx((found.most_sent_bytes + found.reduced_bytes) / 1e6)


def test_a_billion_tokens_are_planned_without_weights_and_what_cannot_run_is_said():
    config = LongNetConfig(vocab_size=100_277)
    found = plan(config, tokens=10**9, devices=64, device_memory=80 * 2**30, mode="checkpointing")
    with torch.device("meta"):
        assert found.parameters == sum(weight.numel() for weight in LongNetForCausalLM(config).parameters())
    assert found.tokens_per_device == 15_625_000 and not found.fits and found.smallest_devices > 64
    assert found.notes == (
        "xPos with xpos_scale_base=512 overflows beyond 65,391 tokens: this model cannot run so many as it is; the "
        "plan is for one that differs in nothing else",
    )
    described = json.loads(json.dumps(found.to_dict()))
    assert described["memory"]["total"] == pytest.approx(found.memory.total)
    assert described["layers"][0]["pattern"] == "segments 2048/1 4096/2 8192/4 16384/6 32768/12, causal"


def test_a_directory_needs_its_configuration_only(tmp_path):
    longformer().config.save_pretrained(tmp_path / "lm")
    assert sizes_of(tmp_path / "lm").parameters == sum(weight.numel() for weight in longformer().parameters())
    tiny_config("longformer").save_pretrained(tmp_path / "hf")
    sizes = sizes_of(tmp_path / "hf")
    assert sizes.vocabulary == 0 and sizes.max_tokens == 64 and sizes.layers[0].global_projections
    alone, together = (plan(sizes, tokens=4096, devices=4, global_tokens=count) for count in (0, 8))
    assert together.operations > alone.operations and together.sent_bytes > alone.sent_bytes
    with pytest.raises(OSError, match="none"):
        sizes_of(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "a plan is for 1 to 1,000,000,000,000 tokens; got 0"),
        ({"devices": 0}, "each device holds a token at least, .* got 0 devices for 64 tokens"),
        ({"devices": 65}, "got 65 devices for 64 tokens"),
        ({"global_tokens": 65}, "between 0 and the 64 tokens; got 65"),
        ({"mode": "inference", "shard_weights": True}, "sharded in training only"),
        ({"mode": "train"}, "mode must be 'inference', 'training' or 'checkpointing'; got 'train'"),
        ({"precision": "int8"}, "precision must be 'fp32' or 'bf16'; got 'int8'"),
        ({"device_memory": 0.0}, "device_memory must be greater than 0; got 0.0"),
        ({"bytes_per_second": -1.0}, "bytes_per_second must be greater than 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(longformer(), **{"tokens": 64, "devices": 2} | changes)


def test_models_of_others_are_refused():
    with pytest.raises(NotImplementedError, match="there is no plan for GPT2LMHeadModel; there is one for"):
        sizes_of(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8)))
