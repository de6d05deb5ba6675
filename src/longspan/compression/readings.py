"""What distillation compares of two models, by name, read from any transformers model in one forward pass.

"logits" [B, L], or "start_logits" and "end_logits" [B, N], or "window_scores" [B, M] of M passages; "hidden.0"
(embeddings' output), "hidden.1", ... [B, N, C]; "query.1", "key.1", "value.1", ... [B, N, H*D], the projections of
layer 1 before they are split into heads.

Shapes: B batch, N tokens, C model width, H heads, D head width, L labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from longspan.models.encoder import Attention

# What the families of transformers call these projections, which stand side by side in one module.
_PROJECTIONS = (("query", "key", "value"), ("q", "k", "v"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"))
_KINDS = ("query", "key", "value")
_LOGITS = ("logits", "start_logits", "end_logits", "window_scores")
LABELS = ("labels", "label", "start_positions", "end_positions", "window_labels", "sentence_labels")


def read(model: nn.Module, batch: Mapping[str, Tensor], wanted: Iterable[str] = ()) -> tuple[dict[str, Tensor], Any]:
    """(all logits and the `wanted` readings by name, the model's own output).

    Raises ValueError for a layer that the model has not, NotImplementedError for projections that are not to be found.
    """
    wanted = set(wanted)
    projected = sorted(name for name in wanted if name.partition(".")[0] in _KINDS)
    hidden = sorted(name for name in wanted if name.startswith("hidden."))
    found: dict[str, Tensor] = {}
    asked = {"output_hidden_states": True} if hidden else {}
    with _listening(model, projected, found):
        output = model(**batch, **asked)
    for name in hidden:
        layer = int(name.partition(".")[2])
        if layer >= len(output.hidden_states):
            raise ValueError(f"{name}: {type(model).__name__} has {len(output.hidden_states) - 1} layers")
        found[name] = output.hidden_states[layer]
    return found | {name: output[name] for name in _LOGITS if name in output}, output


def num_layers(model: Any) -> int:
    return model.config.num_hidden_layers


def width(model: Any) -> int:
    """C, the width of its hidden states."""
    return model.config.hidden_size


@contextmanager
def _listening(model: nn.Module, wanted: list[str], found: dict[str, Tensor]) -> Iterator[None]:
    hooks = []
    try:
        if wanted:
            layers = _attention_layers(model)
            for name in wanted:
                kind, _, number = name.partition(".")
                if int(number) > len(layers):
                    raise ValueError(f"{name}: {type(model).__name__} has {len(layers)} layers")
                module, part = layers[int(number) - 1][kind]

                def keep(_: Any, __: Any, output: Tensor, name: str = name, part: int | None = part) -> None:
                    found[name] = output if part is None else output.chunk(3, -1)[part]

                hooks.append(module.register_forward_hook(keep))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _attention_layers(model: nn.Module) -> list[dict[str, tuple[nn.Module, int | None]]]:
    """For every layer: which module computes query, key and value, and which third of its output is meant."""
    layers: list[dict[str, tuple[nn.Module, int | None]]] = []
    for module in model.modules():
        if isinstance(module, Attention):
            layers.append({kind: (module.qkv, part) for part, kind in enumerate(_KINDS)})
            continue
        for names in _PROJECTIONS:
            parts = [getattr(module, name, None) for name in names]
            if all(isinstance(part, nn.Linear) for part in parts):
                layers.append(
                    {kind: (part, None) for kind, part in zip(_KINDS, parts, strict=True) if part is not None}
                )
    if len(layers) != num_layers(model):
        raise NotImplementedError(
            f"found the query, key and value projections of {len(layers)} of {num_layers(model)} layers in "
            f"{type(model).__name__}: distill without relations, or convert the model (longspan.accelerate)"
        )
    return layers


def token_mask_of(batch: Mapping[str, Tensor]) -> Tensor:
    """Bool[B, N], True = token. ValueError for a batch that does not say."""
    for name in ("attention_mask", "token_mask"):
        if name in batch:
            return batch[name].bool()
    raise ValueError(f"batches need an attention_mask, which tells padding; they hold {', '.join(batch)}")


def inputs_of(batch: Mapping[str, Any], model: nn.Module, *, labels: bool) -> dict[str, Any]:
    """The batch as the model's forward takes it, on its device; without labels unless they are asked for."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    left_out = () if labels else LABELS
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in left_out
    }
