"""LongspanModel: embeddings and encoder as a transformers model, the base of every head.

Shapes: B batch, N tokens, C model width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.generic import can_return_tuple
from transformers.utils.hub import cached_file

from longspan.models.checkpoints import family_of, from_hugging_face, mismatch, translate_config, weight_names
from longspan.models.config import HeadConfig, LongspanConfig
from longspan.models.embeddings import Embeddings
from longspan.models.encoder import Encoder, activation
from longspan.models.packed import PackedEncoder, Precision
from longspan.models.trained_linear import TrainedLinear

# Whose weights a model of ours starts from, by the task of its head.
AUTO_CLASSES: dict[str | None, Any] = {
    None: AutoModel,
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "multiple_choice": AutoModelForMultipleChoice,
}


class LongspanPreTrainedModel(PreTrainedModel):
    """What the base model and the heads share: loading, saving and initialization.

    task: whose head of a Hugging Face checkpoint the class reads, a key of AUTO_CLASSES; None reads the base model.
    """

    config: LongspanConfig
    config_class = LongspanConfig
    base_model_prefix = "longspan"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Embeddings", "Block"]
    # A head that pools otherwise leaves the pooler unread.
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^(longspan\.)?pooler\."]
    task: ClassVar[str | None] = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """The model in a directory or on the hub: one of ours, or a BERT, RoBERTa, DistilBERT, Longformer or ModernBERT
        checkpoint, which is translated while it loads.

        Takes transformers' arguments: dtype, revision, num_labels, id2label, cache_dir, local_files_only, token, ...
        Weights that the checkpoint lacks, such as those of a new head, are drawn anew, with transformers' warning.
        Reads safetensors only, unless use_safetensors=False.
        A checkpoint of `longspan quantize` comes with its encoder packed for inference.
        Raises OSError where there is no model or no weights, NotImplementedError for another family or for an option
        that longspan does not compute, ValueError for weights that do not fit.
        """
        name = pretrained_model_name_or_path
        kwargs.setdefault("use_safetensors", True)
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            if name is None or isinstance(config, LongspanConfig) or _model_type(config or name, kwargs) == "longspan":
                load: Any = cls._load_packed if _is_packed(name, config, kwargs) else super().from_pretrained
                model, info = load(name, *model_args, config=config, output_loading_info=True, **kwargs)
                _refuse_gaps(info["missing_keys"], name)
                return (model, info) if wants_info else model
            given = kwargs if config is None else kwargs | {"config": config}
            theirs, info = AUTO_CLASSES[cls.task].from_pretrained(name, output_loading_info=True, **given)
        except OSError as error:
            raise OSError(_explain(error, name)) from error
        config = translate_config(theirs.config)
        drawn = set(info["missing_keys"])
        _refuse_gaps((ours for ours, sources in weight_names(config, cls.task) if drawn & set(sources)), name)
        weights = from_hugging_face(theirs.state_dict(), config, cls.task)
        model = super().from_pretrained(None, config=config, state_dict=weights, dtype=theirs.dtype)
        model.name_or_path = model.config.name_or_path = str(name)
        return (model, info) if wants_info else model

    @classmethod
    def _load_packed(cls, name, *model_args, config=None, **kwargs):
        """A checkpoint of `longspan quantize`: transformers loads the rest, and the encoder is never widened."""
        hub = _hub_options(kwargs)
        config = LongspanConfig.from_pretrained(name, **hub) if config is None else config
        file = cached_file(name, SAFE_WEIGHTS_NAME, **hub)
        assert file is not None  # it raises OSError where there is none
        weights = load_file(file)
        body = re.compile(r"^(longspan\.)?encoder\.")
        packed = {body.sub("", key): weights.pop(key) for key in list(weights) if body.match(key)}
        described, config.encoder = (
            config.encoder_config,
            replace(config.encoder_config, blocks=(), norm="post").to_dict(),
        )
        load: Any = super().from_pretrained
        model, info = load(None, *model_args, config=config, state_dict=weights, **kwargs)
        model.config.encoder = described.to_dict()
        model.base_model.encoder = PackedEncoder(described, packed, cast(Precision, config.precision))
        return model, info


class Head(nn.Module):
    """The layers that a `HeadConfig` puts before a task's last linear layer: x [..., C] -> [..., C]."""

    def __init__(self, config: HeadConfig, width: int):
        super().__init__()
        self.input_drop, self.drop = nn.Dropout(config.input_dropout), nn.Dropout(config.dropout)
        name, eps = config.activation, config.norm_eps
        self.dense = nn.Identity() if name is None else TrainedLinear(width, width, bias=config.dense_bias)
        self.activation = nn.Identity() if name is None else activation(name)
        self.norm = nn.Identity()
        if name is not None and eps is not None:
            self.norm = nn.LayerNorm(width, eps=eps, bias=config.norm_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.activation(self.dense(self.input_drop(x)))))


class LongspanModel(LongspanPreTrainedModel):
    """Token ids -> a vector for every token, any length that the position table allows."""

    def __init__(self, config: LongspanConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = Embeddings(config.embeddings_config)
        self.encoder = Encoder(config.encoder_config)
        self.pooler = None
        if config.pooler and add_pooling_layer:
            self.pooler = Head(HeadConfig(activation="tanh"), config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word

    def set_input_embeddings(self, value: Any):
        self.embeddings.word = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        first_only: bool = False,
    ) -> BaseModelOutputWithPooling:
        """attention_mask and global_attention_mask: [B, N], nonzero = token, nonzero = global token.
        first_only: last_hidden_state is [B, 1, C], of each row's first token; a packed encoder computes no other in its
        last layer then.

        The states of padding are finite, reach nothing, and are not Hugging Face's where that lets padding look around.
        output_attentions raises NotImplementedError: no backend holds an N x N matrix.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise NotImplementedError(
                "output_attentions=True asks for N x N attention probabilities, which longspan never forms; "
                "leave it out, or read them from the Hugging Face model on a short text"
            )
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        token_mask = None if attention_mask is None else attention_mask.bool()
        global_mask = None if global_attention_mask is None else global_attention_mask.bool()
        states, first, sequence = None, None, self.embeddings.sequence
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if wants_states:
            states = self.encoder.hidden_states(x, token_mask, global_mask, position_ids=position_ids)
            x = states[-1]
        elif first_only and isinstance(self.encoder, PackedEncoder):
            first = self.encoder.first_tokens(x, token_mask, global_mask, position_ids=position_ids)  # [B, C]
        else:
            x = self.encoder(x, token_mask, global_mask, position_ids=position_ids)
        if first is None and (first_only or self.pooler is not None):
            first = sequence.first(x, token_mask)
        pooled = None if self.pooler is None else sequence.once(self.pooler(first))
        x = first[:, None] if first_only and first is not None else x
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled, hidden_states=states)


def _is_packed(name: Any, config: PreTrainedConfig | None, kwargs: dict[str, Any]) -> bool:
    if name is None:
        return False
    fields = PreTrainedConfig.get_config_dict(name, **_hub_options(kwargs))[0] if config is None else config.to_dict()
    return fields.get("precision") is not None


def _hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that say where to look."""
    names = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "force_download")
    return {name: kwargs[name] for name in names if name in kwargs}


def _model_type(source: Any, kwargs: dict[str, Any]) -> str:
    """The model_type of a configuration, directory or hub name. Raises OSError, ValueError, NotImplementedError."""
    if isinstance(source, PreTrainedConfig):
        return source.model_type
    fields, _ = PreTrainedConfig.get_config_dict(source, **kwargs)
    if not fields:
        raise OSError(f"{source} holds no config.json, or an empty one: name a directory that save_pretrained wrote")
    model_type = fields.get("model_type")
    if not model_type:
        raise ValueError(f'the config.json of {source} has no "model_type"; longspan cannot tell which family it is')
    if model_type != "longspan":
        family_of(model_type)
    return model_type


def _refuse_gaps(missing: Iterable[str], name: Any) -> None:
    """ValueError for a checkpoint without a part of its body; a head or pooler may be missing, transformers warns."""
    lost = [key for key in missing if key.removeprefix("longspan.").startswith(("embeddings.", "encoder."))]
    if lost:
        raise ValueError(mismatch(f"the checkpoint {name} is not complete", (), lost))


def _explain(error: OSError, name: Any) -> str:
    """transformers' message, with what to do about a checkpoint that holds no safetensors."""
    folder = Path(str(name))
    if "safetensors" not in str(error) or (folder.is_dir() and not list(folder.glob("*.bin"))):
        return str(error)
    return (
        f"{error} Its weights seem to be pickled, and unpickling can run code. If you trust them, convert them once: "
        f"AutoModel.from_pretrained({str(name)!r}, use_safetensors=False).save_pretrained(NEW_DIRECTORY), with the "
        f"Auto class of the task whose head you need"
    )
