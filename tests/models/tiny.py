"""Tiny random Hugging Face checkpoints of the five families, and batches for them. Every weight is off zero and one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    LongformerConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from longspan.models import (
    LongspanForMaskedLM,
    LongspanForMultipleChoice,
    LongspanForQuestionAnswering,
    LongspanForSequenceClassification,
    LongspanForTokenClassification,
    LongspanModel,
)
from longspan.models.checkpoints import from_hugging_face, translate_config
from longspan.models.model import LongspanPreTrainedModel

FAMILIES = ("bert", "roberta", "distilbert", "longformer", "modernbert")
VOCABULARY = 99
MAX_TOKENS = 64  # what the learned position tables hold

AUTO = {
    None: AutoModel,
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "multiple_choice": AutoModelForMultipleChoice,
}

OURS = {
    model.task: model
    for model in (
        LongspanModel,
        LongspanForMaskedLM,
        LongspanForSequenceClassification,
        LongspanForTokenClassification,
        LongspanForQuestionAnswering,
        LongspanForMultipleChoice,
    )
}
TASKS = tuple(task for task in OURS if task is not None)

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": MAX_TOKENS,
    "attn_implementation": "eager",
}
_OFFSET = {"max_position_embeddings": MAX_TOKENS + 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "bert": (BertConfig, _SIZES | {"pad_token_id": 0}),
    "roberta": (RobertaConfig, _SIZES | _OFFSET),
    "distilbert": (
        DistilBertConfig,
        {
            "vocab_size": VOCABULARY,
            "dim": 24,
            "n_layers": 3,
            "n_heads": 2,
            "hidden_dim": 40,
            "max_position_embeddings": MAX_TOKENS,
            "attn_implementation": "eager",
        },
    ),
    "longformer": (LongformerConfig, _SIZES | _OFFSET | {"attention_window": [4, 8, 16], "sep_token_id": 2}),
    "modernbert": (
        ModernBertConfig,
        _SIZES
        | {
            "num_hidden_layers": 4,
            "local_attention": 8,
            "pad_token_id": 0,
            "bos_token_id": 3,
            "eos_token_id": 4,
            "cls_token_id": 3,
            "sep_token_id": 4,
            "sparse_prediction": False,
        },
    ),
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny `family` model, with `changes` in the family's own names."""
    config_class, fields = _CONFIGS[family]
    return config_class(**fields | changes)


def tiny_model(family: str, task: str | None = None, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A Hugging Face model in eval mode. Weights as Hugging Face draws them (std 0.02), norms and biases with noise."""
    torch.manual_seed(seed)
    model = AUTO[task].from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms start at one, biases at zero: both hide a forgotten weight
                parameter.add_(torch.randn_like(parameter) * (0.1 if "norm" in name.lower() else 0.02))
    return model.eval()


def translated(hf_model: PreTrainedModel, task: str | None = None) -> LongspanPreTrainedModel:
    """The same model as ours, without a trip to the disk."""
    config = translate_config(hf_model.config)
    model = OURS[task](config).to(hf_model.dtype)
    model.load_state_dict(from_hugging_face(hf_model.state_dict(), config, task))
    return model.eval()


def token_mask(lengths: list[int], tokens: int | None = None) -> Tensor:
    """Bool[B, N]: row b starts with lengths[b] tokens and ends with padding."""
    return torch.arange(tokens or max(lengths)) < torch.tensor(lengths)[:, None]


def batch(
    config: PreTrainedConfig, lengths: list[int], tokens: int | None = None, *, seed: int = 1
) -> dict[str, Tensor]:
    """input_ids and attention_mask of rows with these lengths; ids 0 to 4, the special ones, do not occur."""
    mask = token_mask(lengths, tokens)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, config.vocab_size, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask, ids, config.pad_token_id), "attention_mask": mask.long()}
