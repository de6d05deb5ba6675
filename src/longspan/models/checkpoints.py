"""Checkpoints of five Hugging Face families, as ours and back: what a configuration means, and one table of names each.

In the tables a name stands for a module, without `.weight` or `.bias`; `{i}` is the number of the layer; a tuple is
what one fused weight of ours concatenates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from longspan.models import descriptions
from longspan.models.config import LongspanConfig

Names = Mapping[str, str | tuple[str, ...]]


class Family(NamedTuple):
    """describe: a Hugging Face configuration -> fields of LongspanConfig. prefix: of the base model inside a model with
    a head. body: names of the base model. heads: of each task's own layers. tied: second name -> name, of one weight.
    """

    describe: Callable[[Any], dict[str, Any]]
    prefix: str
    body: Names
    heads: Mapping[str, Names]
    tied: dict[str, str]


def translate_config(hf_config: PreTrainedConfig) -> LongspanConfig:
    """The same model, described as ours.

    Raises NotImplementedError, naming the option, for what the encoder would not compute exactly.
    """
    family = family_of(hf_config.model_type)
    for option, plain in _PLAIN_OPTIONS.items():
        asked = getattr(hf_config, option, None)
        by_layer = asked if isinstance(asked, list) else [asked]
        descriptions.refuse_unless(set(by_layer) <= {None, plain}, hf_config, option, repr(plain))
    described = family.describe(hf_config)
    kept = {option: value for option in _KEPT_OPTIONS if (value := getattr(hf_config, option, None)) is not None}
    name = _ALIASES.get(hf_config.model_type, hf_config.model_type)
    return LongspanConfig(family=name, **kept | {"pad_token_id": hf_config.pad_token_id} | described)


def from_hugging_face(
    state_dict: dict[str, Tensor], config: LongspanConfig, task: str | None = None
) -> dict[str, Tensor]:
    """Hugging Face's weights under our names, fused where ours are. task: whose head comes with them; None = no head.

    A weight that is absent altogether stays absent, for the loading model to tell; one that is not fused is not
    copied. Raises ValueError that lists the names that nothing reads and the parts that a fused weight lacks.
    """
    tied = family_of(config.family).tied
    theirs = {tied.get(name, name): weight for name, weight in state_dict.items() if not name.endswith(_BUFFERS)}
    ours: dict[str, Tensor] = {}
    unread, missing = set(theirs), []
    for name, sources in weight_names(config, task):
        absent = [source for source in sources if source not in theirs]
        unread.difference_update(sources)
        if not absent:
            parts = [theirs[source] for source in sources]
            ours[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        elif len(absent) < len(sources):
            missing.extend(absent)
    if unread or missing:
        raise ValueError(mismatch(f"these are not the weights of a {config.family} model", unread, missing))
    return ours


def to_hugging_face(
    state_dict: dict[str, Tensor], config: LongspanConfig, task: str | None = None
) -> dict[str, Tensor]:
    """The inverse of `from_hugging_face`, bit for bit. ValueError lists the names that the family has no place for."""
    theirs: dict[str, Tensor] = {}
    unread = set(state_dict)
    for name, targets in weight_names(config, task):
        if name in state_dict:
            unread.discard(name)
            theirs.update(zip(targets, state_dict[name].chunk(len(targets)), strict=True))
    if unread:
        raise ValueError(mismatch(f"a {config.family} model has no place for some weights", unread, ()))
    tied = family_of(config.family).tied
    return theirs | {second: theirs[first] for second, first in tied.items() if first in theirs}


def weight_names(config: LongspanConfig, task: str | None = None) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every name of ours with the Hugging Face names that it concatenates, whether or not this model has the weight."""
    family = family_of(config.family)
    if task is not None and task not in family.heads:
        raise ValueError(f"unknown task {task!r}; expected one of {sorted(family.heads)}")
    prefixes = ("", "") if task is None else ("longspan.", f"{family.prefix}.")
    yield from _expand(family.body, config.num_hidden_layers, *prefixes)
    if task is not None:
        yield from _expand(family.heads[task], 1, "", "")


def family_of(model_type: str) -> Family:
    """The table that reads a model_type; NotImplementedError lists those there are."""
    name = _ALIASES.get(model_type, model_type)
    if name not in FAMILIES:
        raise NotImplementedError(
            f"longspan has no encoder for model_type {model_type!r}; it reads "
            f"{', '.join(sorted({*FAMILIES, *_ALIASES}))}"
        )
    return FAMILIES[name]


def mismatch(summary: str, unread: Iterable[str], missing: Iterable[str]) -> str:
    """An error message that lists weight names."""
    lists = {"nothing reads": sorted(unread), "missing": sorted(missing)}
    return "; ".join([summary, *(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)])


def _expand(table: Names, layers: int, ours: str, theirs: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, sources in table.items():
        sources = (sources,) if isinstance(sources, str) else sources
        for layer in range(layers if "{i}" in name else 1):
            for kind in ("weight", "bias"):
                yield (
                    f"{ours}{name.format(i=layer)}.{kind}",
                    tuple(f"{theirs}{source.format(i=layer)}.{kind}" for source in sources),
                )


# Options that change what a model computes and that we do not have, each with the value at which it changes nothing.
_PLAIN_OPTIONS = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
    "autoregressive": False,
    "attention_dilation": 1,
}
_KEPT_OPTIONS = (
    *("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "id2label", "label2id", "problem_type", "dtype"),
    *("initializer_range", "tie_word_embeddings", "output_hidden_states", "return_dict", "name_or_path"),
)
_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # in files of transformers 4.30 and older
_ALIASES = {"xlm-roberta": "roberta", "camembert": "roberta"}  # the same model under the same weight names

_BERT: Names = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "encoder.blocks.{i}.attention.qkv": (
        "encoder.layer.{i}.attention.self.query",
        "encoder.layer.{i}.attention.self.key",
        "encoder.layer.{i}.attention.self.value",
    ),
    "encoder.blocks.{i}.attention.out": "encoder.layer.{i}.attention.output.dense",
    "encoder.blocks.{i}.attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "encoder.blocks.{i}.ffn_in": "encoder.layer.{i}.intermediate.dense",
    "encoder.blocks.{i}.ffn_out": "encoder.layer.{i}.output.dense",
    "encoder.blocks.{i}.ffn_norm": "encoder.layer.{i}.output.LayerNorm",
    "pooler.dense": "pooler.dense",
}
_LONGFORMER: Names = _BERT | {
    "encoder.blocks.{i}.attention.qkv_global": (
        "encoder.layer.{i}.attention.self.query_global",
        "encoder.layer.{i}.attention.self.key_global",
        "encoder.layer.{i}.attention.self.value_global",
    ),
}
_DISTILBERT: Names = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "encoder.blocks.{i}.attention.qkv": (
        "transformer.layer.{i}.attention.q_lin",
        "transformer.layer.{i}.attention.k_lin",
        "transformer.layer.{i}.attention.v_lin",
    ),
    "encoder.blocks.{i}.attention.out": "transformer.layer.{i}.attention.out_lin",
    "encoder.blocks.{i}.attention_norm": "transformer.layer.{i}.sa_layer_norm",
    "encoder.blocks.{i}.ffn_in": "transformer.layer.{i}.ffn.lin1",
    "encoder.blocks.{i}.ffn_out": "transformer.layer.{i}.ffn.lin2",
    "encoder.blocks.{i}.ffn_norm": "transformer.layer.{i}.output_layer_norm",
}
_MODERNBERT: Names = {
    "embeddings.word": "embeddings.tok_embeddings",
    "embeddings.norm": "embeddings.norm",
    "encoder.blocks.{i}.attention_norm": "layers.{i}.attn_norm",
    "encoder.blocks.{i}.attention.qkv": "layers.{i}.attn.Wqkv",
    "encoder.blocks.{i}.attention.out": "layers.{i}.attn.Wo",
    "encoder.blocks.{i}.ffn_norm": "layers.{i}.mlp_norm",
    "encoder.blocks.{i}.ffn_in": "layers.{i}.mlp.Wi",
    "encoder.blocks.{i}.ffn_out": "layers.{i}.mlp.Wo",
    "encoder.final_norm": "final_norm",
}
_BERT_HEADS: Mapping[str, Names] = {
    "masked_lm": {
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "classifier": "cls.predictions.decoder",
    },
    "sequence_classification": {"classifier": "classifier"},
    "token_classification": {"classifier": "classifier"},
    "question_answering": {"classifier": "qa_outputs"},
    "multiple_choice": {"classifier": "classifier"},
}
_ROBERTA_HEADS: Mapping[str, Names] = _BERT_HEADS | {
    "masked_lm": {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "classifier": "lm_head.decoder"},
    "sequence_classification": {"head.dense": "classifier.dense", "classifier": "classifier.out_proj"},
}
_DISTILBERT_HEADS: Mapping[str, Names] = _BERT_HEADS | {
    "masked_lm": {"head.dense": "vocab_transform", "head.norm": "vocab_layer_norm", "classifier": "vocab_projector"},
    "sequence_classification": {"head.dense": "pre_classifier", "classifier": "classifier"},
    "multiple_choice": {"head.dense": "pre_classifier", "classifier": "classifier"},
}
_MODERNBERT_HEAD: Names = {"head.dense": "head.dense", "head.norm": "head.norm", "classifier": "classifier"}
_MODERNBERT_HEADS: Mapping[str, Names] = dict.fromkeys(_BERT_HEADS, _MODERNBERT_HEAD) | {
    "masked_lm": _MODERNBERT_HEAD | {"classifier": "decoder"}
}
_ROBERTA_TIED = {"lm_head.bias": "lm_head.decoder.bias"}

FAMILIES = {
    "bert": Family(
        descriptions.bert, "bert", _BERT, _BERT_HEADS, {"cls.predictions.bias": "cls.predictions.decoder.bias"}
    ),
    "roberta": Family(descriptions.roberta, "roberta", _BERT, _ROBERTA_HEADS, _ROBERTA_TIED),
    "longformer": Family(descriptions.longformer, "longformer", _LONGFORMER, _ROBERTA_HEADS, _ROBERTA_TIED),
    "distilbert": Family(descriptions.distilbert, "distilbert", _DISTILBERT, _DISTILBERT_HEADS, {}),
    "modernbert": Family(descriptions.modernbert, "model", _MODERNBERT, _MODERNBERT_HEADS, {}),
}
