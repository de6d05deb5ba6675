"""Small models, and what they keep and hold while they run."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from longspan import (
    LongformerForCausalLM,
    LongformerLMConfig,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetModel,
    LongspanForSequenceClassification,
)

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
BRANCHES = {"segment_lengths": (64, 512), "dilations": (1, 2)}


def longnet(**changes):
    return LongNetForCausalLM(LongNetConfig(**SIZES | BRANCHES | changes))


def longformer(**changes):
    return LongformerForCausalLM(LongformerLMConfig(**SIZES | {"windows": 16} | changes))


def loss_of(model, ids):
    if isinstance(model, LongNetModel):
        return model(ids).last_hidden_state.sum()
    labels = torch.tensor([1]) if isinstance(model, LongspanForSequenceClassification) else ids
    return model(ids, labels=labels).loss


def some_ids(tokens):
    return torch.randint(5, 48, (1, tokens), generator=torch.Generator().manual_seed(0))


def kept_bytes(call, model=None) -> int:
    """Of all storages that the backward pass keeps, the model's weights apart."""
    weights = set() if model is None else {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)


def peak_bytes(call) -> int:
    """The most that torch's tensors hold at a time while it runs, what was there before apart."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
