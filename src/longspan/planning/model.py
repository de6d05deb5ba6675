"""What a plan needs to know of a model: the sizes of its layers, read from a configuration without any weights.

Shapes: C model width, H heads, D head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from longspan.attention import Pattern
from longspan.attention.positions import RelativeSinusoids
from longspan.models import (
    LongformerForCausalLM,
    LongformerLMModel,
    LongNetForCausalLM,
    LongNetModel,
    LongspanConfig,
    LongspanForMaskedLM,
    LongspanForMultipleChoice,
    LongspanForQuestionAnswering,
    LongspanForSequenceClassification,
    LongspanForTokenClassification,
    LongspanModel,
)
from longspan.models.checkpoints import translate_config
from longspan.models.decoder import Block as DecoderBlock
from longspan.models.decoder import Decoder
from longspan.models.embeddings import Embeddings
from longspan.models.encoder import Block as EncoderBlock
from longspan.models.encoder import Encoder

HEADS = {
    "ForMaskedLM": LongspanForMaskedLM,
    "ForSequenceClassification": LongspanForSequenceClassification,
    "ForTokenClassification": LongspanForTokenClassification,
    "ForQuestionAnswering": LongspanForQuestionAnswering,
    "ForMultipleChoice": LongspanForMultipleChoice,
}
STACKS = {
    "longnet": (LongNetModel, LongNetForCausalLM),
    "longformer_lm": (LongformerLMModel, LongformerForCausalLM),
}


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """One layer. Numbers are per token.

    heads, head_width: of the q and k that attention is given, which relative positions widen.
    inner: numbers of q before that, H * D. matrix: of weights that every token meets. parameters: all of the layer's.
    kept: numbers in the dtype of computation that the backward pass needs, beside those of attention. kept_stream:
    those in the dtype of the residual stream. norms: each keeps two float32 sums more.
    ffn_width: of the widest state between the feed-forward's products. tail: numbers beside two of them at its end.
    turned: whether positions turn q and k. norms_first: before each sublayer.
    """

    pattern: Pattern
    heads: int
    head_width: int
    inner: int
    width: int
    ffn_width: int
    parameters: int
    matrix: int
    kept: int
    kept_stream: int
    norms: int
    turned: bool
    subln: bool
    norms_first: bool
    tail: int
    global_projections: bool = False

    @property
    def widened(self) -> bool:
        return self.heads * self.head_width > self.inner

    def attended(self, held: int) -> int:
        """Copies of q that attention keeps where the backward pass needs all 3 of q, k and v, 2 or 0 of them."""
        if self.widened:  # they stand alone, and so does what they give
            return {3: 4, 2: 2, 0: 0}[held]
        if self.turned:  # beside the joined projections
            return {3: 5, 2: 4, 0: 0}[held]
        return {3: 3, 2: 3, 0: 0}[held]


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """matrix, kept, kept_stream, norms: as in `LayerSizes`, of what stands before and after the layers.
    vocabulary: logits of each token, 0 where none are computed for all tokens. position_bytes: float32 tables that all
    layers share, per token.
    max_tokens: the longest sequence that the positions number, None for any length.
    """

    name: str
    layers: tuple[LayerSizes, ...]
    width: int
    parameters: int
    matrices: int
    matrix: int
    kept: int
    kept_stream: int
    norms: int
    vocabulary: int
    position_bytes: int
    max_tokens: int | None
    what_ends: str = ""


def sizes_of(model: str | Path | PreTrainedConfig | nn.Module, name: str = "") -> ModelSizes:
    """The sizes of a model of ours, of a configuration, or of one in a directory or on the hub, which has the head that
    its config.json names. Weights are not read, and none are made.

    Raises OSError where there is no configuration, NotImplementedError for families that longspan does not compute.
    """
    name = name or str(model if isinstance(model, str | Path) else type(model).__name__)
    if not isinstance(model, nn.Module):
        model = _without_weights(model)
    stack = next((part for part in model.modules() if isinstance(part, Decoder | Encoder)), None)
    if stack is None:
        raise NotImplementedError(f"there is no plan for {type(model).__name__}; there is one for {_names()}")
    layers = tuple(
        _decoder_layer(stack, part) if isinstance(stack, Decoder) else _encoder_layer(part) for part in stack.blocks
    )
    inside = {id(part) for part in stack.blocks.modules()}
    every = _reads_every_token(model)
    if not every:  # what reads one token of each row
        inside |= {id(part) for name, part in model.named_modules() if name.startswith(("head.", "classifier"))}
    around = [part for part in model.modules() if id(part) not in inside]
    linear = [part for part in around if isinstance(part, nn.Linear) and every]
    dropouts = [part for part in around if isinstance(part, nn.Dropout) and part.p > 0]
    vocabulary = linear[-1].out_features if linear else 0
    norms = [part for part in around if isinstance(part, nn.LayerNorm)]
    ends, what = _ends(stack, model)
    width = stack.config.width
    return ModelSizes(
        name=name,
        layers=layers,
        width=width,
        parameters=sum(weight.numel() for weight in model.parameters()),
        matrices=_matrices(model.modules()),
        matrix=sum(part.weight.numel() for part in linear),
        kept=sum(part.in_features for part in linear) + (width if len(linear) > 1 else 0),  # and of an activation
        kept_stream=width * (len(norms) + len(dropouts)),
        norms=len(norms),
        vocabulary=vocabulary,
        position_bytes=_position_bytes(stack),
        max_tokens=ends,
        what_ends=what,
    )


def _without_weights(model: str | Path | PreTrainedConfig) -> nn.Module:
    config = model if isinstance(model, PreTrainedConfig) else AutoConfig.from_pretrained(str(model))
    wanted = (config.architectures or [""])[0]
    if config.model_type in STACKS:
        base, language_model = STACKS[config.model_type]
        kind: Any = base if wanted == base.__name__ else language_model
    else:
        if not isinstance(config, LongspanConfig):
            config = translate_config(config)
        kind = next((head for ending, head in HEADS.items() if wanted.endswith(ending)), LongspanModel)
    with torch.device("meta"):
        return kind(config)


def _names() -> str:
    return "longspan's encoders with any head, LongNet and the Longformer language model"


def _reads_every_token(model: nn.Module) -> bool:
    """Whether the head gives something for each token, not for the whole row."""
    described = getattr(model, "described", None)
    return hasattr(model, "lm_head") or (described is not None and described.pooling is None)


def _matrices(modules: Iterable[nn.Module]) -> int:
    return sum(part.weight.numel() for part in modules if isinstance(part, nn.Linear))


def _decoder_layer(stack: Decoder, block: nn.Module) -> LayerSizes:
    assert isinstance(block, DecoderBlock)
    config = stack.config
    relative = block.attention.relative
    width, ffn = config.width, config.ffn_width
    kept = 3 * width + 2 * ffn + (width + ffn) * config.subln
    kept += 2 * width * (config.dropout > 0) + ffn * (config.ffn_inner_dropout > 0) + width * (relative is not None)
    matrix = _matrices(block.modules())
    if isinstance(relative, RelativeSinusoids):
        matrix += relative.weight.numel()
    turned = relative is None and config.rotary is not None
    return LayerSizes(
        pattern=stack.patterns[block.attention.layer],
        heads=config.heads,
        head_width=config.head_width + (config.relative_width if relative is not None else 0),
        inner=width,
        width=width,
        ffn_width=ffn,
        parameters=sum(weight.numel() for weight in block.parameters()),
        matrix=matrix,
        kept=kept,
        kept_stream=2 * width,
        norms=4 if config.subln else 2,
        turned=turned,
        subln=config.subln,
        norms_first=not config.deepnorm,
        tail=0,
    )


def _encoder_layer(block: nn.Module) -> LayerSizes:
    assert isinstance(block, EncoderBlock)
    config, described = block.config, block.block
    inner, width, ffn = described.heads * described.head_width, config.width, described.ffn_width
    norms = sum(isinstance(part, nn.LayerNorm) for part in (block.attention_norm, block.ffn_norm))
    dropped = width * ((block.attention_drop.p > 0) + (block.ffn_drop.p > 0)) + ffn * (block.inner_drop.p > 0)
    turned = described.rope_theta is not None
    own = [part for part in block.modules() if part is not block.attention.qkv_global]
    return LayerSizes(
        pattern=described.pattern,
        heads=described.heads,
        head_width=described.head_width,
        inner=inner,
        width=width,
        ffn_width=ffn * (2 if config.gated else 1),
        parameters=sum(weight.numel() for weight in block.parameters()),
        matrix=_matrices(own),
        kept=2 * width + inner + (4 if config.gated else 2) * ffn + dropped,
        kept_stream=norms * width,
        norms=norms,
        turned=turned,
        subln=False,
        norms_first=config.norm == "pre",
        tail=0 if config.gated else width,
        global_projections=described.global_projections,
    )


def _position_bytes(stack: Decoder | Encoder) -> int:
    """Factors that turn q and k: complex for decoders, and others for k where they fade; cosines and sines else."""
    if isinstance(stack, Encoder):
        kinds = {(block.head_width, block.rope_theta) for block in stack.config.blocks if block.rope_theta is not None}
        return sum(8 * width for width, _ in kinds)
    rotary = stack.config.rotary
    return 0 if rotary is None else 4 * rotary.width * (1 if rotary.decay_base is None else 2)


def _ends(stack: Decoder | Encoder, model: nn.Module) -> tuple[int | None, str]:
    if isinstance(stack, Decoder):
        rotary = stack.config.rotary
        if rotary is None or rotary.decay_base is None:
            return None, ""
        return int(2 * rotary.span), f"xPos with xpos_scale_base={rotary.decay_base:g} overflows"
    limit = next((part.config.max_tokens for part in model.modules() if isinstance(part, Embeddings)), None)
    return limit, "the table of positions ends" if limit is not None else ""
