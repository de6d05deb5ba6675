"""Plug-in mode: a Hugging Face model keeps its embeddings, pooler and head, and computes with our encoder.

Shapes: B batch, N tokens, C model width.
"""

from __future__ import annotations

import functools
import inspect
from functools import partial, update_wrapper
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.longformer.modeling_longformer import LongformerBaseModelOutputWithPooling
from transformers.utils.generic import ModelOutput

from longspan.models.checkpoints import from_hugging_face, to_hugging_face, translate_config
from longspan.models.compiled import CompiledEncoder
from longspan.models.config import LongspanConfig
from longspan.models.embeddings import EmbeddingsConfig, check_length
from longspan.models.encoder import Encoder
from longspan.models.packed import InferenceEncoder, PackedEncoder, Precision, check_precision, check_weights
from longspan.models.sequence import first_tokens

Model = TypeVar("Model", bound=nn.Module)


class Place(NamedTuple):
    """replaced: the parts of a base model that our encoder stands for. inputs: what its embeddings read. output: the
    class of what it returns."""

    replaced: tuple[str, ...]
    inputs: tuple[str, ...]
    output: type[ModelOutput]


_ALL_INPUTS = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
PLACES = {
    "bert": Place(("encoder",), _ALL_INPUTS, BaseModelOutputWithPoolingAndCrossAttentions),
    "roberta": Place(("encoder",), _ALL_INPUTS, BaseModelOutputWithPoolingAndCrossAttentions),
    "distilbert": Place(("transformer",), ("input_ids", "position_ids", "inputs_embeds"), BaseModelOutput),
    "longformer": Place(("encoder",), _ALL_INPUTS, LongformerBaseModelOutputWithPooling),
    "modernbert": Place(("layers", "final_norm", "rotary_emb"), ("input_ids", "inputs_embeds"), BaseModelOutput),
}


def accelerate(model: Model, precision: Precision | None = None) -> Model:
    """The same object with our encoder in place of its own: the same outputs, in memory linear in the length.

    model: a Hugging Face BERT, RoBERTa, DistilBERT, Longformer or ModernBERT, with any head or none, or a model of
    longspan's own. It keeps its class, configuration, embeddings, head, dropout, dtype, device, frozen layers and
    gradient checkpointing. `state_dict`, `load_state_dict` and `save_pretrained` still speak Hugging Face's names:
    what it saves is a stock checkpoint. A model that computes with our encoder already is returned as it is.

    precision: None keeps an encoder that trains. "fp32", "bf16" and "int8" pack it for inference, several times faster:
    it computes no padding, gives 0 there, and drops its weights as they were, so save the model before. int8 keeps
    embeddings, head, attention and global projections in higher precision. On CUDA "fp32", "bf16" and "fp16" compile
    it (see `CompiledEncoder`).

    Surprises: the encoder's parameters are new objects, so make the optimizer afterwards. Attention probabilities are
    never formed, so `output_attentions=True` raises NotImplementedError. Padded tokens get other hidden states than
    from Hugging Face, but no token sees them; where padding stands on the left, place 0 holds the last state of the
    row's first token, for that is where heads look.
    Raises NotImplementedError for other families and for decoders; ValueError for what is no transformers model. When
    called, the model raises ValueError for inputs longer than its position table and NotImplementedError for attention
    masks that are not [B, N]. With a precision also ValueError for another precision, for weights with NaN and for a
    model that is packed in another one; when called, for training mode and inputs that want gradients.
    """
    base = getattr(model, "base_model", None)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"accelerate() takes a transformers model, such as AutoModel.from_pretrained() gives; "
            f"got {type(model).__name__}"
        )
    if precision is not None:
        check_precision(precision, base.device)
    present = getattr(base, "encoder", None)
    if isinstance(present, InferenceEncoder) and precision not in (None, present.precision):
        raise ValueError(
            f"the model is packed in {present.precision} already and has no weights left to pack in {precision}: load "
            f"it again"
        )
    if not isinstance(present, Encoder | InferenceEncoder):
        _plug_in(base)
    del present
    if precision is not None and isinstance(base.encoder, Encoder):
        _pack(base, precision)
    return model


def _plug_in(base: Any) -> None:
    """Our encoder in place of a Hugging Face model's own."""
    config = translate_config(base.config)
    place = PLACES[config.family]
    if not all(hasattr(base, name) for name in place.replaced):
        raise NotImplementedError(
            f"{type(base).__name__} is not built like transformers' own {base.config.model_type} model: it has no "
            f"{' or no '.join(place.replaced)}"
        )
    encoder = _make_encoder(base, place, config)
    for name in place.replaced:
        delattr(base, name)
    base.encoder = encoder
    # On the object, not by a subclass: checkpoints and pipelines know the model by the name of its class.
    base.forward = update_wrapper(partial(_forward, base, place, config.embeddings_config), base.forward)
    base.register_state_dict_post_hook(_to_stock_names)
    base.register_load_state_dict_pre_hook(_from_stock_names)


def _pack(base: Any, precision: Precision) -> None:
    """The encoder packed, in its own place; each weight of it is dropped as soon as it is packed."""
    config, was_training = base.encoder.config, base.encoder.training
    if base.device.type == "cuda":
        base.encoder = CompiledEncoder(base.encoder, precision)
    else:
        weights = base.encoder.state_dict()
        check_weights(config, weights)
        del base.encoder
        base.encoder = PackedEncoder(config, weights, precision)
    base.encoder.train(was_training)


def _make_encoder(base: Any, place: Place, config: LongspanConfig) -> Encoder:
    """Our encoder with the weights of `base`: only q, k and v are copied, to lie side by side."""
    old = {name: value for name, value in base.named_parameters() if name.split(".")[0] in place.replaced}
    weights = from_hugging_face({name: value.detach() for name, value in old.items()}, config)
    is_trained = from_hugging_face({name: torch.tensor([value.requires_grad]) for name, value in old.items()}, config)
    with torch.device("meta"):
        encoder = Encoder(config.encoder_config)
    encoder.load_state_dict({name.removeprefix("encoder."): value for name, value in weights.items()}, assign=True)
    for name, parameter in encoder.named_parameters():
        parts = is_trained[f"encoder.{name}"]
        if parts.any() != parts.all():
            raise ValueError(
                f"some of the query, key and value projections behind {name} are frozen and some are not; longspan "
                f"keeps them in one weight: freeze all three or none before accelerate()"
            )
        parameter.requires_grad_(bool(parts.all()))
    checkpointed = next((part for part in base.modules() if getattr(part, "gradient_checkpointing", False)), None)
    if checkpointed is not None:
        encoder.gradient_checkpointing = True
        encoder._gradient_checkpointing_func = checkpointed._gradient_checkpointing_func
    return encoder.train(base.training)


@functools.cache
def _signature(kind: type[Any]) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _forward(
    base: Any, place: Place, embeddings: EmbeddingsConfig, *args: Any, **kwargs: Any
) -> ModelOutput | tuple[Any, ...]:
    """What the base model's own forward returns for these arguments, which are its own."""
    kind = type(base)
    signature = inspect.signature(kind.forward) if torch.compiler.is_compiling() else _signature(kind)
    given = signature.bind(base, *args, **kwargs).arguments
    given = given | given.pop("kwargs", {})

    def asked(option: str) -> Any:
        return getattr(base.config, option, None) if given.get(option) is None else given[option]

    if asked("output_attentions"):
        raise NotImplementedError(
            "output_attentions=True asks for N x N attention probabilities, which longspan never forms; "
            "leave it out, or ask the model before accelerate(), on a short text"
        )
    inputs = {name: given[name] for name in place.inputs if given.get(name) is not None}
    if ("input_ids" in inputs) == ("inputs_embeds" in inputs):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    _check_length(embeddings, **inputs)
    is_longformer = place.output is LongformerBaseModelOutputWithPooling
    token_mask, global_mask = _read_mask("attention_mask", given), _read_mask("global_attention_mask", given)
    if is_longformer and token_mask is not None:
        marked = given["attention_mask"].int() == 2  # Longformer's other way to say global
        global_mask = marked if global_mask is None else global_mask | marked
    if token_mask is not None and not torch.compiler.is_compiling() and bool(token_mask.all()):
        token_mask = None  # nothing to hide, so every backend takes its faster way

    x = base.embeddings(**{"input_ids": None} | inputs)  # [B, N, C]
    read = base.encoder.hidden_states if asked("output_hidden_states") else base.encoder
    read = read(x, token_mask, global_mask, position_ids=given.get("position_ids"))
    *states, x = read if isinstance(read, tuple) else (read,)
    if token_mask is not None:  # heads look at place 0, which is padding where rows are padded on the left
        x = torch.cat((first_tokens(x, token_mask)[:, None], x[:, 1:]), 1)
    pooler = getattr(base, "pooler", None)
    pooled = {} if pooler is None else {"pooler_output": pooler(x)}
    output = place.output(last_hidden_state=x, **pooled, hidden_states=(*states, x) if states else None)
    if asked("return_dict") is not False:
        return output
    # Longformer's heads expect hidden states in third place, also behind a pooler that is not there.
    return (x, None, *output.to_tuple()[1:]) if is_longformer and pooler is None else output.to_tuple()


def _check_length(
    config: EmbeddingsConfig,
    input_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    **_: Tensor,
) -> None:
    """ValueError where torch would fail inside the position table, and on a GPU take the process along."""
    rows = inputs_embeds if input_ids is None else input_ids
    assert rows is not None
    needed, limit = rows.shape[1], config.max_tokens
    if limit is None or (position_ids is None and needed <= limit) or torch.compiler.is_compiling():
        return
    if position_ids is not None:
        needed = int(position_ids.max()) + 1 - config.position_offset
    elif config.positions_skip_padding and input_ids is not None:
        needed = int((input_ids != config.padding_idx).sum(1).max())
    check_length(needed, limit)


def _read_mask(name: str, given: dict[str, Any]) -> Tensor | None:
    mask = given.get(name)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        came = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"{name} must be [B, N], nonzero at tokens; got {came}. Which token sees which is up to the model"
        )
    return None if mask is None else mask > 0


def _to_stock_names(base: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """After base.state_dict(): our encoder's weights under Hugging Face's names."""
    ours = [name for name in state_dict if name.startswith(f"{prefix}encoder.")]
    weights = {name.removeprefix(prefix): state_dict.pop(name) for name in ours}
    stock = to_hugging_face(weights, translate_config(base.config))
    state_dict.update({prefix + name: weight for name, weight in stock.items()})


def _from_stock_names(base: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before base.load_state_dict(): Hugging Face's encoder weights under our names."""
    config = translate_config(base.config)
    replaced = tuple(f"{prefix}{name}." for name in PLACES[config.family].replaced)
    theirs = [name for name in state_dict if name.startswith(replaced)]
    weights = from_hugging_face({name.removeprefix(prefix): state_dict.pop(name) for name in theirs}, config)
    state_dict.update({prefix + name: weight for name, weight in weights.items()})
