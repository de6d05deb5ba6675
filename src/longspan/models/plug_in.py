"""Plug-in mode: a Hugging Face model keeps its embeddings, pooler and head, and computes with our encoder.

Shapes: B batch, N tokens, C model width.
"""

from __future__ import annotations

import inspect
from functools import partial, update_wrapper
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.longformer.modeling_longformer import LongformerBaseModelOutputWithPooling
from transformers.utils import ModelOutput

from longspan.models.checkpoints import from_hugging_face, to_hugging_face, translate_config
from longspan.models.encoder import Encoder

Model = TypeVar("Model", bound=nn.Module)


class Place(NamedTuple):
    """replaced: the base model's parts that our encoder stands for. inputs: what its embeddings read. output: what it
    returns."""

    replaced: tuple[str, ...]
    inputs: tuple[str, ...]
    output: type[ModelOutput]


_IDS_TYPES_POSITIONS = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
PLACES = {
    "bert": Place(("encoder",), _IDS_TYPES_POSITIONS, BaseModelOutputWithPoolingAndCrossAttentions),
    "roberta": Place(("encoder",), _IDS_TYPES_POSITIONS, BaseModelOutputWithPoolingAndCrossAttentions),
    "distilbert": Place(("transformer",), ("input_ids", "position_ids", "inputs_embeds"), BaseModelOutput),
    "longformer": Place(("encoder",), _IDS_TYPES_POSITIONS, LongformerBaseModelOutputWithPooling),
    "modernbert": Place(("layers", "final_norm", "rotary_emb"), ("input_ids", "inputs_embeds"), BaseModelOutput),
}


def accelerate(model: Model) -> Model:
    """The same object, with our encoder in place of its own: same outputs, any length, memory linear in it.

    model: a Hugging Face BERT, RoBERTa, DistilBERT, Longformer or ModernBERT model with any head or none. One that
    already computes with our encoder is returned as it is. What it keeps: its class, config, embeddings and head,
    dropout, dtype, device, frozen layers and gradient checkpointing; `state_dict`, `save_pretrained` and
    `load_state_dict` speak Hugging Face's names, so what it saves is a stock checkpoint.

    Surprises: make the optimizer afterwards, for the encoder's parameters are new objects. Attention probabilities are
    never formed, so `output_attentions=True` raises NotImplementedError. Hidden states at padded tokens, which
    Hugging Face computes for all families but Longformer and which no token sees, have other values.
    Raises NotImplementedError for other families, decoders and attention masks other than [B, N]; ValueError for
    anything that is not a transformers model.
    """
    base = getattr(model, "base_model", None)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"accelerate() takes a transformers model, such as AutoModel.from_pretrained(...) returns; "
            f"got {type(model).__name__}"
        )
    if any(isinstance(part, Encoder) for part in base.children()):
        return model
    config = translate_config(base.config)
    place = PLACES[config.family]
    if not all(hasattr(base, name) for name in place.replaced):
        raise NotImplementedError(
            f"{type(base).__name__} is not built like transformers' own {config.family} model: it lacks "
            f"{' or '.join(place.replaced)}"
        )
    encoder = _build_encoder(base, place)
    for name in place.replaced:
        delattr(base, name)
    base.encoder = encoder
    # On the object, not in a subclass: the class keeps its name, by which checkpoints and pipelines know it.
    base.forward = update_wrapper(partial(_forward, base), base.forward)
    base.register_state_dict_post_hook(_to_stock_names)
    base.register_load_state_dict_pre_hook(_from_stock_names)
    return model


def _build_encoder(base: PreTrainedModel, place: Place) -> Encoder:
    """Our encoder with the weights of `base`: only q, k and v are copied, to lie side by side."""
    config = translate_config(base.config)
    old = {name: value for name, value in base.named_parameters() if name.split(".")[0] in place.replaced}
    weights = from_hugging_face({name: value.detach() for name, value in old.items()}, config)
    trained = from_hugging_face({name: torch.tensor([value.requires_grad]) for name, value in old.items()}, config)
    with torch.device("meta"):
        encoder = Encoder(config.encoder_config)
    encoder.load_state_dict({name.removeprefix("encoder."): value for name, value in weights.items()}, assign=True)
    for name, parameter in encoder.named_parameters():
        parts = trained[f"encoder.{name}"]
        if parts.any() != parts.all():
            raise ValueError(
                f"some of the query, key and value projections in {name} are frozen and some are not; longspan keeps "
                f"them in one weight: freeze all three or none before accelerate()"
            )
        parameter.requires_grad_(bool(parts.all()))
    checkpointed = next((part for part in base.modules() if getattr(part, "gradient_checkpointing", False)), None)
    if checkpointed is not None:
        encoder.gradient_checkpointing = True
        encoder._gradient_checkpointing_func = checkpointed._gradient_checkpointing_func
    return encoder.train(base.training)


def _forward(base: Any, *args: Any, **kwargs: Any) -> ModelOutput | tuple[Any, ...]:
    """What the base model's own forward returns, for its own arguments."""
    given = inspect.signature(type(base).forward).bind(base, *args, **kwargs).arguments
    given = given | given.pop("kwargs", {})
    config, place = base.config, PLACES[translate_config(base.config).family]

    def option(name: str) -> Any:
        value = given.get(name)
        return getattr(config, name, None) if value is None else value

    if option("output_attentions"):
        raise NotImplementedError(
            "output_attentions=True: longspan computes attention without forming its probabilities; ask a model that "
            "accelerate() has not changed"
        )
    inputs = {name: given[name] for name in place.inputs if given.get(name) is not None}
    if ("input_ids" in inputs) == ("inputs_embeds" in inputs):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    _check_length(base, inputs)
    token_mask, global_mask = _read_masks(given.get("attention_mask"), given.get("global_attention_mask"))
    x = base.embeddings(**{"input_ids": None} | inputs)  # [B, N, C]
    states = base.encoder.hidden_states(x, token_mask, global_mask, position_ids=given.get("position_ids"))
    ...
