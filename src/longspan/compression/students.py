"""A smaller model to start a distillation from: some layers of the teacher."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from longspan.compression.distillation_loss import uniform_layers
from longspan.compression.importance import encoder_of
from longspan.compression.prune import rebuilt
from longspan.models.convert import as_ours


def student_of(teacher: PreTrainedModel, layers: int | Sequence[int]) -> Any:
    """A model of ours with the teacher's embeddings, head and some of its layers, as copies.

    teacher: ours, or a BERT, RoBERTa, DistilBERT, Longformer or ModernBERT of transformers, with any head or none.
    layers: how many, taken at even distances up to the last, those that a "uniform" layer map compares; or which,
        counted from 1.
    Raises ValueError for layers that the teacher has not, NotImplementedError for other families.
    """
    model = as_ours(teacher)
    encoder = encoder_of(model)
    there = len(encoder.blocks)
    chosen = uniform_layers(layers, there) if isinstance(layers, int) else list(layers)
    if not chosen or not all(1 <= layer <= there for layer in chosen):
        raise ValueError(f"layers must be numbers from 1 to {there}; got {layers}")
    prefix = next(name for name, module in model.named_modules() if module is encoder) + ".blocks."
    numbered = re.compile(re.escape(prefix) + r"(\d+)\.")
    weights = {name: weight for name, weight in model.state_dict().items() if not numbered.match(name)}
    for to, layer in enumerate(chosen):
        of_layer = f"{prefix}{layer - 1}."
        for name, weight in model.state_dict().items():
            if name.startswith(of_layer):
                weights[f"{prefix}{to}.{name.removeprefix(of_layer)}"] = weight
    blocks = tuple(encoder.config.blocks[layer - 1] for layer in chosen)
    return rebuilt(model, replace(encoder.config, blocks=blocks), weights)
