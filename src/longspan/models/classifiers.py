"""A checkpoint as a classifier of a task's labels that reads texts of a given length, with its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

from longspan.models.checkpoints import family_of, translate_config
from longspan.models.config import LongspanConfig
from longspan.models.convert import to_long
from longspan.models.heads import LongspanForSequenceClassification, LongspanForSpanClassification
from longspan.models.model import LongspanModel

logger = logging.getLogger(__name__)

BEYOND = 10**9  # transformers writes a number of this order where a tokenizer has no limit


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """model, its tokenizer, and the most tokens a row may have (None: any number).

    lengthened_from: tokens that the checkpoint read before it was converted by `to_long`; None where it was not.
    """

    model: Any
    tokenizer: Any
    max_tokens: int | None
    lengthened_from: int | None = None


def load_classifier(
    source: str | Path,
    labels: Sequence[str],
    *,
    max_tokens: int | None = None,
    window: int = 512,
    spans: bool = False,
    new_head: bool = False,
    seed: int = 0,
) -> Classifier:
    """A classifier of `labels` from the checkpoint in a directory or on the hub.

    Families that longspan has come as its own models, others as Hugging Face's, as they are.
    max_tokens: None for what the checkpoint reads. A BERT, RoBERTa or DistilBERT checkpoint that reads less is
    converted with `to_long` and windows of `window` tokens, both sides together, and a warning is logged.
    spans: with a head that reads spans. A head that is new is drawn from `seed`; one that is there must have `labels`
    in their order (or as many without names), or new_head must ask for another.
    Raises OSError where there is no model or tokenizer, ValueError for other labels and for more tokens than a model of
    Hugging Face reads, NotImplementedError for spans with such a model.
    """
    labels = list(labels)
    if max_tokens is not None and max_tokens < 3:
        raise ValueError(f"max_tokens must be at least 3, for a token between the two special ones; got {max_tokens}")
    config = AutoConfig.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    described = _described(config)
    if spans and described is None:
        raise NotImplementedError(
            f"spans are read by longspan's models, and it has none for model_type {config.model_type!r}: start from a "
            f"BERT, RoBERTa, DistilBERT, Longformer or ModernBERT checkpoint"
        )
    kind: Any
    if described is None:
        kind, base_kind, limit = AutoModelForSequenceClassification, AutoModel, _stock_limit(config, tokenizer)
    else:
        kind = LongspanForSpanClassification if spans else LongspanForSequenceClassification
        base_kind, limit = LongspanModel, described.embeddings_config.max_tokens
    if described is None and max_tokens is not None and limit is not None and max_tokens > limit:
        raise ValueError(
            f"{source} reads at most {limit} tokens, and longspan cannot lengthen a {config.model_type} model: ask for "
            f"{limit} at most, or start from a BERT, RoBERTa or DistilBERT checkpoint"
        )
    if not new_head and any("Classification" in name for name in config.architectures or ()):
        _refuse_other_labels(config, labels, source)
    torch.manual_seed(seed)
    names = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
    load: Any = base_kind if new_head else kind
    model: Any = load.from_pretrained(source, dtype=torch.float32, **names)
    if new_head:
        base, model = model, kind(model.config) if described is not None else kind.from_config(model.config)
        model.base_model.load_state_dict(base.state_dict(), strict=False)  # one of them may have no pooler
    model.config.problem_type = "single_label_classification"
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if described is None or max_tokens is None or limit is None or max_tokens <= limit:
        read = limit if described is None else limit or described.trained_tokens
        return Classifier(model=model, tokenizer=tokenizer, max_tokens=max_tokens or read)
    logger.warning("%s reads %d tokens: made long, to read %d through windows of %d", source, limit, max_tokens, window)
    long = to_long(model, max_tokens=max_tokens, window=window)
    tokenizer.model_max_length = max_tokens
    return Classifier(model=long, tokenizer=tokenizer, max_tokens=max_tokens, lengthened_from=limit)


def _described(config: PreTrainedConfig) -> LongspanConfig | None:
    """The configuration as ours; None for a family that longspan does not have."""
    if isinstance(config, LongspanConfig):
        return config
    try:
        family_of(config.model_type)
    except NotImplementedError:
        return None
    return translate_config(config)


def _stock_limit(config: PreTrainedConfig, tokenizer: Any) -> int | None:
    """The longest row that a model of Hugging Face reads; None where neither it nor its tokenizer says."""
    limits = (getattr(config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min((limit for limit in limits if limit and limit < BEYOND), default=None)


def _refuse_other_labels(config: PreTrainedConfig, labels: list[str], source: str | Path) -> None:
    found = [str(name) for _, name in sorted((config.id2label or {}).items())]
    if found in (labels, [f"LABEL_{number}" for number in range(len(labels))]):
        return
    raise ValueError(
        f"{source} tells apart {', '.join(map(repr, found))} and the task's labels are {', '.join(map(repr, labels))}: "
        f"ask for a new head to train other labels"
    )
