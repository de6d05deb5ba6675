"""The heads: masked language model, classification of sequences, tokens and spans, question answering, multiple choice.

A head is described by its `HeadConfig`, so that one class serves every family.

Shapes: B batch, N tokens, C model width, L labels, K choices, S spans.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from longspan.models.config import LongspanConfig
from longspan.models.model import Head, LongspanModel, LongspanPreTrainedModel
from longspan.models.ngrams import NgramLogits
from longspan.models.sequence import WholeSequence
from longspan.models.trained_linear import TrainedLinear

logger = logging.get_logger(__name__)


class _TaskModel(LongspanPreTrainedModel):
    """Base model -> pooling -> `Head` -> classifier. A task adds its output and its loss."""

    task: ClassVar[str]
    output_class: ClassVar[Any]
    accepts_loss_kwargs = True  # so that Trainer tells num_items_in_batch and accumulated tokens weigh alike

    def __init__(self, config: LongspanConfig, outputs: int | None = None):
        super().__init__(config)
        self.num_labels = config.num_labels
        outputs = self.num_labels if outputs is None else outputs
        self.described = config.head_config(self.task)
        if self.described.pooling == "pooler" and not config.pooler:
            raise ValueError(f"the {self.task} head reads the base model's pooler, and this config has pooler=False")
        self.longspan = LongspanModel(config, add_pooling_layer=self.described.pooling == "pooler")
        self.head = Head(self.described, config.hidden_size)
        self.classifier = TrainedLinear(config.hidden_size, outputs or 0, bias=self.described.output_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Logits [B, N, L] or, where the head pools, [B, L]; the loss where labels come.

        attention_mask, global_attention_mask: [B, N], nonzero = token, nonzero = global token; a head may choose the
        global tokens itself (`HeadConfig.global_tokens`) when the caller names none.
        num_items_in_batch: what to divide the summed loss by, the number of labels of this batch by default.
        """
        logits, states = self.read(
            input_ids,
            attention_mask,
            global_attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states,
            output_attentions,
        )
        loss = None if labels is None else self.loss(logits, labels, num_items_in_batch)
        return self.output_class(loss=loss, logits=logits, hidden_states=states)

    def read(self, *inputs: Any) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """(logits, hidden states or None) for what `LongspanModel.forward` takes, in its order."""
        input_ids, attention_mask, global_mask, token_type_ids, position_ids, inputs_embeds, *asked = inputs
        token_mask = None if attention_mask is None else attention_mask.bool()
        if global_mask is None and self.described.global_tokens is not None:
            global_mask = self.choose_global_tokens(input_ids, inputs_embeds, token_mask)
        pooling, sequence = self.described.pooling, self.sequence
        outputs = self.longspan(
            *(input_ids, token_mask, global_mask, token_type_ids, position_ids, inputs_embeds, *asked),
            first_only=self.described.reads_first_only,
            return_dict=True,
        )
        x = outputs.last_hidden_state  # [B, N, C] or [B, 1, C]
        if pooling is None:
            return self.classifier(self.head(x)), outputs.hidden_states
        if pooling == "pooler":
            x = outputs.pooler_output  # [B, C]
        else:
            x = x[:, 0] if pooling == "first" else sequence.mean(x, token_mask)
        return sequence.once(self.classifier(self.head(x))), outputs.hidden_states

    @property
    def sequence(self) -> WholeSequence:
        """What the tokens of a forward pass are a part of."""
        return self.longspan.embeddings.sequence

    def choose_global_tokens(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, token_mask: Tensor | None
    ) -> Tensor | None:
        """Bool[B, N]: the tokens that this task lets see everything, as Hugging Face's Longformer heads choose them."""
        given = inputs_embeds if input_ids is None else input_ids
        if given is None:
            return None  # the embeddings will say so
        if self.described.global_tokens == "first":
            if token_mask is None:
                token_mask = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
            passed = self.sequence.before(token_mask.sum(1))[:, None]
            return token_mask & (token_mask.cumsum(1) + passed == 1)
        if input_ids is None:
            logger.warning_once(
                "inputs_embeds shows no separators, so no token gets global attention: pass global_attention_mask"
            )
            return None
        first, is_separator = _first_separators(input_ids, self.config.sep_token_id, self.sequence)
        index = _places(given, self.sequence)
        if self.described.global_tokens == "before_separator":
            return index < first
        return (index > first) & ~((index == first + 1) & is_separator)  # RoBERTa puts two separators in between

    def loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Cross entropy over the last axis, in fp32 or wider; a label of -100 counts for nothing."""
        logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.flatten().to(logits.device)
        summed = F.cross_entropy(logits, labels, reduction="sum")
        if num_items_in_batch is not None:
            return summed / num_items_in_batch
        counted = (labels != -100).sum()
        if self.described.pooling is not None:
            return summed / counted
        return self.sequence.total(summed) / self.sequence.total(counted)


class LongspanForMaskedLM(_TaskModel):
    """Logits over the vocabulary for every token; the last layer shares the word embeddings."""

    task = "masked_lm"
    output_class = MaskedLMOutput
    _tied_weights_keys: ClassVar = {"classifier.weight": "longspan.embeddings.word.weight"}

    def __init__(self, config: LongspanConfig):
        super().__init__(config, config.vocab_size)

    def get_output_embeddings(self):
        return self.classifier

    def set_output_embeddings(self, new_embeddings):
        self.classifier = new_embeddings


class LongspanForSequenceClassification(_TaskModel):
    """Logits [B, L] for whole rows. `config.problem_type` says regression, one label or several; None guesses."""

    task = "sequence_classification"
    output_class = SequenceClassifierOutput

    def __init__(self, config: LongspanConfig):
        super().__init__(config)
        self.ngrams = NgramLogits(config.ngram_buckets, self.num_labels or 0) if config.ngram_buckets else None

    def read(self, input_ids: Tensor | None, attention_mask: Tensor | None, *others: Any) -> Any:
        logits, states = super().read(input_ids, attention_mask, *others)
        if self.ngrams is None:
            return logits, states
        if input_ids is None:
            raise ValueError("this model also reads n-grams, which inputs_embeds do not show: pass input_ids")
        whole = self.sequence.whole
        said = self.ngrams(whole(input_ids), None if attention_mask is None else whole(attention_mask.bool()))
        return logits + self.sequence.once(said).to(logits.dtype), states

    def loss(self, logits, labels, num_items_in_batch):
        loss = self.loss_function(
            labels=labels, pooled_logits=logits, config=self.config, num_items_in_batch=num_items_in_batch
        )
        if num_items_in_batch is not None and self.config.problem_type != "single_label_classification":
            loss = loss * (labels.numel() / num_items_in_batch)  # transformers means these two over this batch alone
        return loss


class LongspanForTokenClassification(_TaskModel):
    """Logits [B, N, L], one set of labels for every token."""

    task = "token_classification"
    output_class = TokenClassifierOutput


class LongspanForQuestionAnswering(_TaskModel):
    """Logits of an answer's first and last token, [B, N] each."""

    task = "question_answering"

    def __init__(self, config: LongspanConfig):
        super().__init__(config, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Any:
        """start_positions, end_positions: Long[B]; those outside the row are left out of the loss. As with Hugging Face
        padding has its share in the loss's softmax, and nowhere else."""
        logits, states = self.read(
            input_ids,
            attention_mask,
            global_attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states,
            output_attentions,
        )
        start, end = (part.contiguous() for part in logits.unbind(-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            every = self.sequence.whole(logits)
            loss = self.loss_function(every[..., 0], every[..., 1], start_positions, end_positions)
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, hidden_states=states)


class LongspanForMultipleChoice(_TaskModel):
    """Logits [B, K], one for each choice; the inputs are [B, K, N]."""

    task = "multiple_choice"

    def __init__(self, config: LongspanConfig):
        super().__init__(config, 1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """labels: Long[B], the number of the right choice. hidden_states come as [B * K, N, C]."""
        inputs = (input_ids, attention_mask, global_attention_mask, token_type_ids, position_ids, inputs_embeds)
        rows = (None if given is None else given.flatten(0, 1) for given in inputs)
        logits, states = self.read(*rows, output_hidden_states, output_attentions)
        choices = next(given.shape[1] for given in (input_ids, inputs_embeds) if given is not None)
        logits = logits.view(-1, choices)
        loss = None if labels is None else self.loss(logits, labels, num_items_in_batch)
        return MultipleChoiceModelOutput(loss=loss, logits=logits, hidden_states=states)


class LongspanForSpanClassification(LongspanPreTrainedModel):
    """Logits [B, L] for rows and spans in them: does a word mean the same twice (WiC), are two the same thing (WSC)?

    Reads the first token and the mean of each span. config.num_spans: S, 2 where it is not given.
    `from_pretrained` also takes the checkpoints that `LongspanModel` takes and draws the head anew.
    """

    def __init__(self, config: LongspanConfig):
        super().__init__(config)
        config.num_spans = getattr(config, "num_spans", 2)
        self.num_labels = config.num_labels
        self.longspan = LongspanModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.encoder_config.dropout)
        self.classifier = nn.Linear((1 + config.num_spans) * config.hidden_size, config.num_labels or 0)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        global_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        span_ranges: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Any:
        """span_ranges: Long[B, S, 2], places in the padded row, end exclusive. labels: Long[B]; -100 = none.

        A model with global projections makes the first token and the spans global unless the caller chooses.
        Raises ValueError for ranges of another shape and for spans without a token.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        sequence = self.longspan.embeddings.sequence
        places = _places(given, sequence)
        spans = self._span_mask(span_ranges, places)  # [B, S, N]
        if attention_mask is not None:
            spans = spans & attention_mask.bool()[:, None]
        lengths = sequence.total(spans.sum(-1, keepdim=True))
        if not (torch.compiler.is_compiling() or torch._C._get_tracing_state()) and not bool(lengths.all()):
            raise ValueError("a span in span_ranges holds no token: start < end, and it must not lie in padding")
        if global_attention_mask is None and self._has_global_projections:
            global_attention_mask = spans.any(1) | (places == 0)
        outputs = self.longspan(
            input_ids,
            attention_mask,
            global_attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states,
            output_attentions,
            return_dict=True,
        )
        x = outputs.last_hidden_state  # [B, N, C]
        means = sequence.shared((spans.to(x.dtype) / lengths) @ x).flatten(1)  # [B, S * C]
        token_mask = None if attention_mask is None else attention_mask.bool()
        read = torch.cat((sequence.first(x, token_mask), means), -1)
        logits = sequence.once(self.classifier(self.dropout(read)))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels.to(logits.device))
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    @property
    def _has_global_projections(self) -> bool:
        return any(block.global_projections for block in self.config.encoder_config.blocks)

    def _span_mask(self, span_ranges: Tensor | None, places: Tensor) -> Tensor:
        """Bool[B, S, N]. places: Long[N]."""
        count = self.config.num_spans
        if span_ranges is None or span_ranges.dim() != 3 or span_ranges.shape[1:] != (count, 2):
            got = "none" if span_ranges is None else tuple(span_ranges.shape)
            raise ValueError(f"span_ranges must have the shape [B, {count}, 2], start and end of each span; got {got}")
        return (places >= span_ranges[..., :1]) & (places < span_ranges[..., 1:])


def _places(given: Tensor, sequence: WholeSequence) -> Tensor:
    """Where the tokens of given [B, N, ...] stand in their sequence, Long[N]."""
    start, _ = sequence.span(given.shape[1])
    return torch.arange(start, start + given.shape[1], device=given.device)


def _first_separators(input_ids: Tensor, separator: int | None, sequence: WholeSequence) -> tuple[Tensor, Tensor]:
    """(place of each row's first separator Long[B, 1], all separators Bool[B, N]). ValueError for a row without one."""
    if separator is None:
        raise ValueError(
            "config.sep_token_id is None, so the global tokens cannot be told: set it, or pass global_attention_mask"
        )
    is_separator = input_ids == separator
    start, total = sequence.span(input_ids.shape[1])
    here = torch.where(is_separator.any(1), is_separator.int().argmax(1) + start, total)
    first = sequence.least(here)
    if not torch.compiler.is_compiling():
        lacking = (first == total).nonzero()[:, 0].tolist()
        if lacking:
            raise ValueError(
                f"rows {lacking} hold no separator token (id {separator}), so where the question ends cannot be told: "
                f"separate question and text, or pass global_attention_mask"
            )
    return first[:, None], is_separator
