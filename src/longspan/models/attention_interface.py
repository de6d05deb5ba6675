"""longspan's patterns in transformers' own models: `set_attention(model, SlidingWindow(512, 0))`.

transformers dispatches the attention of most models by a name, `attn_implementation`. This module registers "longspan":
one function for the mask, which passes the padding on, and one for the attention, which hands q, k and v to `attend`.

Shapes: B batch, H heads, M queries, N keys, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from longspan.attention import Full, Pattern, attend, pattern_from_dict
from longspan.models.encoder import Encoder
from longspan.models.packed import InferenceEncoder

NAME = "longspan"
Model = TypeVar("Model", bound=PreTrainedModel)

# What models hand to their attention beside q, k and v that changes its result and that `attend` does not compute.
_UNKNOWN = {
    "position_bias": "biases of its own",
    "softcap": "capped scores",
    "s_aux": "attention sinks",
    "sliding_window": "sliding windows of its own",
    "cu_seq_lens_q": "packed sequences",
    "block_table": "a paged cache",
    "cache": "a paged cache",
}


def set_attention(model: Model, pattern: Pattern | Sequence[Pattern] | None = None) -> Model:
    """The same model, whose tokens see what `pattern` says, in memory linear in the length.

    model: any model of transformers that dispatches its attention by name, such as GPT-2, Llama or BERT with any head.
    pattern: one for all layers, or one per layer; None: what a saved model's config says. Nothing else changes:
    weights, dropout, padding masks, `generate()` and its caches, gradients and `save_pretrained`, which keeps the
    pattern in `config.longspan_pattern`. `model.set_attn_implementation("sdpa")` undoes it.

    Places count padding: a sliding window does not mind, DilatedSegments refuses padding on the left. Attention
    probabilities are never formed, so `output_attentions=True` raises NotImplementedError.
    Raises ValueError for patterns that the model cannot honor: one that looks ahead in a causal model, one made for
    other heads, another number than layers; NotImplementedError for models that do not dispatch, with an encoder and a
    decoder, cross-attention or windows of their own, and for global keys, which mark places of one batch.
    """
    _check_model(model)
    config: Any = model.config
    if pattern is None:
        if getattr(config, "longspan_pattern", None) is None:
            raise ValueError("give a pattern: the model's config has no longspan_pattern to go by")
        described = config.longspan_pattern
        pattern = (
            [pattern_from_dict(one) for one in described]
            if isinstance(described, list)
            else pattern_from_dict(described)
        )
    layers = list(_attention_modules(model))
    given: list[Any] = list(pattern) if isinstance(pattern, list | tuple) else [pattern]
    for one in given:
        _check_pattern(one, config, causal=any(_is_causal(layer) for layer in layers))
    if not isinstance(pattern, list | tuple):
        config.longspan_pattern = given[0].to_dict()
    else:
        if len(given) != config.num_hidden_layers:
            raise ValueError(
                f"give one pattern for all layers or {config.num_hidden_layers}, one for each; got {len(given)}"
            )
        if {layer.layer_idx for layer in layers} != set(range(config.num_hidden_layers)):
            raise NotImplementedError(
                f"the attention layers of {type(model).__name__} do not know their number: give one pattern for all"
            )
        config.longspan_pattern = [one.to_dict() for one in given]
    model.set_attn_implementation(NAME)
    return model


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"set_attention takes a transformers model, such as AutoModel.from_pretrained() gives; "
            f"got {type(model).__name__}"
        )
    name, config = type(model).__name__, model.config
    if any(isinstance(part, Encoder | InferenceEncoder) for part in model.modules()):
        raise NotImplementedError(
            f"{name} computes with longspan's own encoder already, whose pattern is part of its config: "
            f"see longspan.to_long and attention_window"
        )
    if not model._can_set_attn_implementation() or not any(_attention_modules(model)):
        raise NotImplementedError(f"{name} does not dispatch its attention by name, so nothing can be put in its place")
    if config.sub_configs:
        raise NotImplementedError(f"{name} is made of several models; call set_attention on the one that reads text")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise NotImplementedError(f"{name} has cross-attention, which patterns do not describe")
    own = _own_windows(config)
    if own is not None:
        raise NotImplementedError(f"{name} has windows of its own ({own}); load it with a config without them")


def _own_windows(config: Any) -> str | None:
    """What of a config limits what tokens see."""
    types = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
    if types:
        return f"layer_types {', '.join(sorted(types))}"
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(config, name, None) is not None and getattr(config, "layer_types", None) is None:
            return f"{name}={getattr(config, name)}"
    return None


def _check_pattern(pattern: Any, config: Any, *, causal: bool) -> None:
    if not isinstance(pattern, Pattern):
        raise ValueError(
            f"pattern must be a longspan.attention Pattern, such as SlidingWindow(512, 0); got {pattern!r}"
        )
    if pattern.extra_keys() is not None:
        raise NotImplementedError(
            f"global keys mark places of one batch, a model reads many; longspan.accelerate and LongspanModel take "
            f"them with each call; got {pattern!r}"
        )
    pattern.check_fits(1, config.num_attention_heads, 1, torch.device("cpu"))
    if causal and pattern.looks_ahead():
        raise ValueError(
            f"{pattern!r} looks ahead, but a {config.model_type} is causal: give a pattern that does not, such as "
            f"SlidingWindow(512, 0), or one with causal=True"
        )


def _attention_modules(model: nn.Module) -> Any:
    """The modules that compute attention; every family gives theirs these two attributes."""
    return (module for module in model.modules() if hasattr(module, "is_causal") and hasattr(module, "layer_idx"))


def _is_causal(module: Any) -> bool:
    """Whether its tokens must not see those that follow. A config may turn a decoder into an encoder."""
    return bool(module.is_causal) and getattr(module.config, "is_causal", True) is not False


def _pattern_of(module: Any) -> Pattern:
    described = getattr(module.config, "longspan_pattern", None)
    if described is None:
        return Full(causal=_is_causal(module))
    if isinstance(described, list):
        described = described[module.layer_idx]
    kept = module.__dict__.get("_longspan_pattern")
    if kept is None or kept[0] is not described:
        kept = described, pattern_from_dict(described)
        _check_pattern(kept[1], module.config, causal=_is_causal(module))
        module.__dict__["_longspan_pattern"] = kept
    return kept[1]


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """Bool[B, N] up to the last query, True at tokens; None where all keys are tokens and the last is the last query.

    Raises NotImplementedError where the model wants another mask than causal or bidirectional.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function) or int(kv_offset):
        raise NotImplementedError(
            "attn_implementation='longspan' knows causal and bidirectional models and padding; this call asks for a "
            "mask of another kind, such as packed sequences, the model's own windows or its cache of them"
        )
    if mask_function is bidirectional_mask_function and q_offset == 0 and q_length != kv_length:
        last = kv_length  # a prefix of keys without queries stands before the row
    else:
        last = int(q_offset) + q_length  # a cache of fixed size has places behind it that hold nothing yet
    if attention_mask is None:
        return None if last == kv_length else torch.ones(batch_size, last, dtype=torch.bool, device=device)
    attention_mask = attention_mask[:, :last].bool()
    if attention_mask.shape[1] < last:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} places, but with what the cache holds there are {last} "
            f"tokens; give one for all of them"
        )
    return None if last == kv_length and bool(attention_mask.all()) else attention_mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[B, M, H, D] for query [B, H, M, D], key and value [B, H or fewer, N, D]; the queries are the last of the keys.

    attention_mask: what `mask` gave.
    """
    for name, what in _UNKNOWN.items():
        if options.get(name) is not None:
            raise NotImplementedError(
                f"attn_implementation='longspan' cannot run {type(module).__name__}, which has {what}"
            )
    if options.get("output_attentions"):
        raise NotImplementedError("attn_implementation='longspan' never forms attention probabilities")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise NotImplementedError(
            f"attn_implementation='longspan' takes attention_mask as [B, N], 1 at tokens; "
            f"got {list(attention_mask.shape)}"
        )
    pattern = _pattern_of(module)
    if is_causal and pattern.looks_ahead():
        raise ValueError(f"{pattern!r} looks ahead, but this call of {type(module).__name__} is causal")
    if attention_mask is not None:
        key, value = (rows[:, :, : attention_mask.shape[1]] for rows in (key, value))
        if not pattern.shift_invariant() and not bool(attention_mask[:, 0].all()):
            raise NotImplementedError(
                f"{pattern!r} counts places from the start of a row, so padding must stand on the right; "
                f"got padding on the left"
            )
    positions = None
    queries, keys = query.shape[2], key.shape[2]
    if queries != keys:
        reach = pattern.reach()
        first = 0  # of the keys that any query sees
        if reach is not None and pattern.shift_invariant():
            first = max(0, keys - queries - reach.before)
        key, value = (rows[:, :, first:] for rows in (key, value))
        attention_mask = None if attention_mask is None else attention_mask[:, first:]
        positions = torch.arange(keys - queries - first, keys - first, device=query.device)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (rows.repeat_interleave(groups, dim=1) for rows in (key, value))
    out = attend(
        query,
        key,
        value,
        pattern,
        token_mask=attention_mask,
        query_positions=positions,
        scale=scaling,
        dropout=dropout,
    )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
