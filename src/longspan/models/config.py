"""The configuration of longspan's own model family, as transformers keeps it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import PreTrainedConfig

from longspan.models.embeddings import EmbeddingsConfig
from longspan.models.encoder import EncoderConfig, activation


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What stands between the encoder and the last linear layer of one task.

    pooling: what becomes one vector per row: "pooler" (the base model's), the "first" token or the "mean" of all
        tokens; None keeps every token.
    activation: of a C -> C layer, followed by a norm unless norm_eps is None; None leaves both out.
    input_dropout, dropout: before that layer, and before the last one.
    global_tokens: which tokens see everything when the caller does not say (Longformer): the "first" one, those
        "before_separator" (a question) or "after_separator" (a choice); None for none.
    """

    pooling: Literal["pooler", "first", "mean"] | None = None
    activation: str | None = None
    dense_bias: bool = True
    norm_eps: float | None = None
    norm_bias: bool = True
    input_dropout: float = 0.0
    dropout: float = 0.0
    output_bias: bool = True
    global_tokens: Literal["first", "before_separator", "after_separator"] | None = None

    def __post_init__(self):
        if self.pooling not in (None, "pooler", "first", "mean"):
            raise ValueError(f"pooling must be None, 'pooler', 'first' or 'mean'; got {self.pooling!r}")
        if self.global_tokens not in (None, "first", "before_separator", "after_separator"):
            raise ValueError(
                "global_tokens must be None, 'first', 'before_separator' or 'after_separator'; "
                f"got {self.global_tokens!r}"
            )
        if self.activation is not None:
            activation(self.activation)

    @property
    def reads_first_only(self) -> bool:
        """Whether only the first token's vector of each row is looked at."""
        return self.pooling in ("pooler", "first")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# What a task gets when a configuration does not describe it.
_PLAIN_HEADS = {
    "masked_lm": HeadConfig(activation="gelu", norm_eps=1e-12),
    "sequence_classification": HeadConfig(pooling="first", activation="tanh"),
    "multiple_choice": HeadConfig(pooling="first", activation="tanh"),
}


class LongspanConfig(PreTrainedConfig):
    """A model as data: `embeddings`, `encoder` and `heads` are dictionaries of the dataclasses that describe them.

    heads: task name -> fields of its `HeadConfig`; a task that is not named gets a plain head.
    pooler: whether the base model ends in a tanh layer over the first token (`pooler_output`).
    family: where the weights came from ("bert", ...): the names they go back to. Nothing in the model reads it.
    trained_tokens: the longest input the checkpoint was trained on; advice that nothing enforces.
    precision: what the encoder of a packed checkpoint computes in (`longspan quantize`); None: it is not packed.
    ngram_buckets: rows of the table by which a classifier of sequences also hears n-grams (`NgramLogits`); 0: none.
    """

    model_type = "longspan"

    embeddings: dict[str, Any] | None = None
    encoder: dict[str, Any] | None = None
    heads: dict[str, dict[str, Any]] | None = None
    pooler: bool = False
    family: str = "bert"
    trained_tokens: int | None = None
    precision: str | None = None
    ngram_buckets: int = 0
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    cls_token_id: int | None = None
    sep_token_id: int | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    @property
    def embeddings_config(self) -> EmbeddingsConfig:
        return EmbeddingsConfig(**_described(self.embeddings, "embeddings"))

    @property
    def encoder_config(self) -> EncoderConfig:
        return EncoderConfig.from_dict(_described(self.encoder, "encoder"))

    def head_config(self, task: str) -> HeadConfig:
        """The head of a task: "masked_lm", "sequence_classification", "token_classification", ..."""
        fields = (self.heads or {}).get(task)
        return _PLAIN_HEADS.get(task, HeadConfig()) if fields is None else HeadConfig(**fields)

    @property
    def hidden_size(self) -> int:
        return _described(self.encoder, "encoder")["width"]

    @property
    def num_hidden_layers(self) -> int:
        return len(_described(self.encoder, "encoder")["blocks"])

    @property
    def vocab_size(self) -> int:
        return _described(self.embeddings, "embeddings")["vocab_size"]

    @vocab_size.setter
    def vocab_size(self, tokens: int):  # resize_token_embeddings sets it
        self.embeddings = _described(self.embeddings, "embeddings") | {"vocab_size": tokens}


def _described(fields: dict[str, Any] | None, name: str) -> dict[str, Any]:
    if fields is None:
        raise ValueError(f"this LongspanConfig does not describe its {name}: pass {name}={{...}}, or load a checkpoint")
    return fields
