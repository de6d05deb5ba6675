"""Tiny random language models of both families, in float64, with every weight off zero and one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan import LongformerForCausalLM, LongformerLMConfig, LongNetConfig, LongNetForCausalLM
from longspan.models.language_model import StackForCausalLM

VOCABULARY = 30
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "relative_width": 8,
}
OWN = {
    "longformer_lm": {"windows": (3, 5, 8), "dilations": (1, 2, 3)},
    "longnet": {"segment_lengths": (6, 10, 24), "dilations": (1, 2, 3)},
    "longnet, no branch keeps all": {"segment_lengths": (7, 16), "dilations": (2, 3), "offsets": "interleaved"},
}
CLASSES = {
    "longformer_lm": (LongformerLMConfig, LongformerForCausalLM),
    "longnet": (LongNetConfig, LongNetForCausalLM),
    "longnet, no branch keeps all": (LongNetConfig, LongNetForCausalLM),
}
POSITIONS = ("xpos", "rotary", "relative", "bucketed", "none")


def tiny_config(family: str, **changes: Any):
    return CLASSES[family][0](**SIZES | OWN[family] | changes)


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> StackForCausalLM:
    torch.manual_seed(seed)
    model = CLASSES[family][1](tiny_config(family, **changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def some_ids(rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
