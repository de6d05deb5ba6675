"""LongspanForEvidence: which passage of a document of any length answers a question.

One row is [CLS] question [SEP] document; the question's tokens are global, so every document token reads the question
and the question reads the whole document, at linear cost. A passage is scored by the mean of its token vectors
against the question encoded alone.

Shapes: B batch, N tokens, C model width, Q question tokens, M passages.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_NAME
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file

from longspan.attention import Pattern
from longspan.models.config import LongspanConfig
from longspan.models.linear import Weight
from longspan.models.model import LongspanModel, LongspanPreTrainedModel

COSINE_SCALE = 20.0  # sentence-transformers' training temperature of all-MiniLM-L6-v2, so step 0 is that retriever
SENTENCE_WEIGHT = 0.5
SPANS_AT_ONCE = 2048
STRETCH = 26  # tokens, some 20 words
EMBEDDED_AT_ONCE = 2048  # tokens
ONE_PASS = 262_144  # tokens; at most some 5 GiB in bf16 for six layers of width 384


@dataclass
class EvidenceOutput(ModelOutput):
    """loss: scalar, where labels came. window_scores [B, M]; -inf at padded windows. hidden_states: [B, N, C] each, of
    the embeddings and after every layer, where they were asked for."""

    loss: Tensor | None = None
    window_scores: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class SpanScorer(nn.Module):
    """Score of a span: 20 * alpha * cos(m, q) + MLP([m, m * q]), m its mean vector and q the question's.

    The MLP's last layer starts at zero, so an untrained scorer is a cosine retriever.
    """

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(()))
        self.inner = nn.Linear(2 * width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, means: Tensor, question: Tensor) -> Tensor:
        """means [B, M, C], question [B, C] -> [B, M], fp32."""
        with torch.autocast(means.device.type, enabled=False):
            means, question = F.normalize(means.float(), dim=-1), F.normalize(question.float(), dim=-1)[:, None]
            cosine = (means * question).sum(-1)
            scale = means.shape[-1] ** 0.5
            features = torch.cat((means * scale, means * question * scale**2), -1) * 0.25  # of the order of 1
            return COSINE_SCALE * self.alpha * cosine + self.out(F.gelu(self.inner(features)))[..., 0]


class LongspanForEvidence(LongspanPreTrainedModel):
    """A long encoder that scores passages of a document against a question.

    config.calibration: see `passage_probability`; config.score_weights: see `weigh`; config.weights_format:
    "int8_rows" in a checkpoint of `save_compact`.
    """

    def __init__(self, config: LongspanConfig):
        super().__init__(config)
        config.calibration = getattr(config, "calibration", None)
        config.score_weights = getattr(config, "score_weights", None)
        config.weights_format = getattr(config, "weights_format", None)
        self.longspan = LongspanModel(config, add_pooling_layer=False)
        self.window_scorer = SpanScorer(config.hidden_size)
        self.sentence_scorer = SpanScorer(config.hidden_size)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As every longspan model; a compact checkpoint (`save_compact`) is widened to `dtype`, float32 by default."""
        name = pretrained_model_name_or_path
        options = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
        hub = {key: kwargs[key] for key in options if key in kwargs}
        if config is not None or name is None or not _is_compact(name, hub):
            return super().from_pretrained(name, *model_args, config=config, **kwargs)
        config = LongspanConfig.from_pretrained(name, **hub)
        file = cached_file(name, SAFE_WEIGHTS_NAME, **hub)
        assert file is not None  # it raises OSError where there is none
        weights = widen_rows(load_file(file))
        config.weights_format = None
        kwargs.setdefault("dtype", torch.float32)
        return super().from_pretrained(None, *model_args, config=config, state_dict=weights, **kwargs)

    def save_compact(self, directory: str | Path) -> None:
        """Writes config and weights with matrices in 8 bits, a quarter of the size; `from_pretrained` reads them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.config)
        config.weights_format, config.architectures = "int8_rows", [type(self).__name__]
        config.save_pretrained(directory)
        save_file(narrow_rows(self.state_dict()), directory / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SpanScorer):
            nn.init.ones_(module.alpha)
            nn.init.zeros_(module.out.weight)
            nn.init.zeros_(module.out.bias)

    def forward(
        self,
        input_ids: Tensor,
        token_mask: Tensor,
        question_lengths: Tensor,
        windows: Tensor,
        window_mask: Tensor,
        window_labels: Tensor | None = None,
        sentences: Tensor | None = None,
        sentence_mask: Tensor | None = None,
        sentence_labels: Tensor | None = None,
        position_offsets: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> EvidenceOutput:
        """Scores of the windows of a batch of rows, and the loss where labels come.

        input_ids Long[B, N]; token_mask Bool[B, N]; question_lengths Long[B], special tokens included. windows
        Long[B, M, 2] are token ranges of the row, window_mask and window_labels Bool[B, M]; sentences likewise.
        position_offsets Long[B] shift the document's
        positions: they repeat, so training at random offsets makes the model indifferent to where a text begins.
        output_hidden_states: of the rows; the questions on their own are not among them.
        """
        read, question = self._encode_both(
            input_ids, token_mask, question_lengths, position_offsets, every_layer=output_hidden_states
        )
        document, states = read[-1], read if output_hidden_states else None
        scores = self.window_scorer(span_means(document, windows), question).masked_fill(~window_mask, -torch.inf)
        if window_labels is None:
            return EvidenceOutput(window_scores=scores, hidden_states=states)
        loss = evidence_loss(scores, window_labels)
        if sentences is not None and sentence_mask is not None and sentence_labels is not None:
            sentence_scores = self.sentence_scorer(span_means(document, sentences), question)
            sentence_scores = sentence_scores.masked_fill(~sentence_mask, -torch.inf)
            loss = loss + SENTENCE_WEIGHT * evidence_loss(sentence_scores, sentence_labels)
        return EvidenceOutput(loss=loss, window_scores=scores, hidden_states=states)

    def encode(
        self,
        input_ids: Tensor,
        token_mask: Tensor | None,
        question_lengths: Tensor,
        position_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(token vectors [B, N, C], question vectors [B, C]): the rows, and the questions on their own.

        token_mask None: no row is padded.
        """
        states, question = self._encode_both(input_ids, token_mask, question_lengths, position_offsets)
        return states[-1], question

    def _encode_both(
        self, input_ids, token_mask, question_lengths, position_offsets, *, every_layer: bool = False
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """(states of the rows, of the last layer or of all; question vectors)"""
        index = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        is_question = index < question_lengths[:, None]
        position_ids = index
        if position_offsets is not None:
            position_ids = index + torch.where(is_question, 0, position_offsets[:, None])
        states = self._encode(input_ids, token_mask, is_question, position_ids, every_layer)
        longest = int(question_lengths.max())
        alone = is_question[:, :longest]
        vectors = self._encode(input_ids[:, :longest], alone, None, index[:, :longest])[-1].float()
        question = (vectors * alone[..., None]).sum(1) / question_lengths[:, None]
        return states, question

    @torch.inference_mode()
    def score_windows(
        self,
        question_ids: Tensor,
        document_ids: Tensor,
        spans: Tensor,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Scores of passages of a document of any length: fp32 [M].

        question_ids Long[Q], special tokens included. document_ids Long[N], none. spans Long[M, 2]: token ranges of
        the document, not empty. progress is called with (tokens read, tokens in all).

        A document of up to ONE_PASS tokens is one pass. A longer one is read in parts with as many tokens on both
        sides as the layers can see, so that local attention is that of one pass; the question then reads each part
        for itself.
        """
        return self.weigh(self.score_parts(question_ids, document_ids, spans, progress=progress))

    @torch.inference_mode()
    def score_parts(
        self,
        question_ids: Tensor,
        document_ids: Tensor,
        spans: Tensor,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """What `score_windows` weighs, fp32 [3, M]; it takes the same."""
        if not len(spans):
            return torch.zeros(3, 0)
        total = len(document_ids)
        halo = sum(self._reach(block.pattern) for block in self.longspan.encoder.config.blocks)
        states, question = [], None
        for start in range(0, total, ONE_PASS):
            first, last = max(0, start - halo), min(total, start + ONE_PASS + halo)
            row = torch.cat((question_ids, document_ids[first:last]))[None]
            offsets = torch.tensor([first], device=row.device)
            lengths = torch.tensor([len(question_ids)], device=row.device)
            with self._reporting(progress, start, min(total, start + ONE_PASS), total):
                read, question = self.encode(row, None, lengths, offsets)
            place = len(question_ids) + start - first
            states.append(read[:, place : place + min(ONE_PASS, total - start)])
        assert question is not None  # each part of a text has one, and where there are spans, there is a text
        document = states[0] if len(states) == 1 else torch.cat(states, 1)
        return self.parts_of(document, question, question_ids, document_ids, spans)

    def parts_of(
        self, document: Tensor, question: Tensor, question_ids: Tensor, document_ids: Tensor, spans: Tensor
    ) -> Tensor:
        """`score_parts` from the vectors of a document [1, N, C] and of its question [1, C].

        The score of each span as a whole; the best score that the sentence scorer gives to a stretch of it; and how
        many of the question's words it repeats (`lexical_matches`).
        """
        starts = torch.arange(0, max(1, len(document_ids) - STRETCH + 1), STRETCH // 2, device=spans.device)
        stretches = torch.stack((starts, (starts + STRETCH).clamp(max=len(document_ids))), 1)

        def scored(scorer: SpanScorer, ranges: Tensor) -> Tensor:
            scores = []
            for part in ranges.split(SPANS_AT_ONCE):  # neighbors, so that few token vectors are widened at a time
                low, high = int(part.min()), int(part.max())
                scores.append(scorer(span_means(document[:, low:high], (part - low)[None]), question)[0])
            return torch.cat(scores)

        best = best_within(scored(self.sentence_scorer, stretches), spans)
        matches = lexical_matches(question_ids, document_ids, spans)
        return torch.stack((scored(self.window_scorer, spans), best, matches))

    def weigh(self, parts: Any) -> Any:
        """The scores [M] that `score_parts` [3, M] make, tensor or array: the whole passage counts once, its best
        stretch and its words by `config.score_weights`, which `longspan train reader` fits (None: not at all)."""
        stretch, words = self.config.score_weights or (0.0, 0.0)
        return parts[0] + stretch * parts[1] + words * parts[2]

    def passage_probability(self, scores: Tensor) -> Tensor:
        """Probability that each passage overlaps the evidence, [M], from the scores [M] of all candidates together.

        Logistic regression on the log of a passage's softmax share, and on its score: fitted on held-out questions
        after training (`config.calibration`), so that of the passages given 0.8, four in five hold evidence.
        """
        share, score, bias = self.config.calibration or (1.0, 0.0, 0.0)
        return torch.sigmoid(share * (scores - scores.logsumexp(0)) + score * scores + bias)

    @contextmanager
    def _reporting(self, progress: Callable[[int, int], None] | None, start: int, end: int, total: int):
        """Calls `progress` after each layer's first pass, as if each read its share of the tokens."""
        if progress is None:
            yield
            return
        blocks = self.longspan.encoder.blocks

        def report(number: int, *_) -> None:
            hooks[number - 1].remove()  # the question, read on its own afterwards, is no progress
            progress(start + number * (end - start) // len(blocks), total)

        hooks = [block.register_forward_hook(partial(report, number)) for number, block in enumerate(blocks, 1)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _reach(pattern: Pattern) -> int:
        reach = pattern.reach()
        return ONE_PASS if reach is None else max(reach.before, reach.after)

    def _encode(self, input_ids, token_mask, global_mask, position_ids, every_layer=False) -> tuple[Tensor, ...]:
        embeddings, encoder = self.longspan.embeddings, self.longspan.encoder
        dtype = embeddings.word.weight.dtype
        if torch.is_autocast_enabled(input_ids.device.type):
            dtype = torch.get_autocast_dtype(input_ids.device.type)
        elif getattr(encoder, "precision", "fp32") != "fp32":
            dtype = torch.bfloat16
        if torch.is_grad_enabled():
            x = embeddings(input_ids, position_ids=position_ids).to(dtype)
        else:  # a part at a time: what lies between two operations stays in the processor's cache
            x = torch.empty(*input_ids.shape, encoder.config.width, dtype=dtype, device=input_ids.device)
            for start in range(0, input_ids.shape[1], EMBEDDED_AT_ONCE):
                part = slice(start, start + EMBEDDED_AT_ONCE)
                x[:, part] = embeddings(input_ids[:, part], position_ids=position_ids[:, part])
        if every_layer:
            return encoder.hidden_states(x, token_mask, global_mask, position_ids=position_ids)
        return (encoder(x, token_mask, global_mask, position_ids=position_ids),)


def _is_compact(name: str | Path, hub: dict[str, Any]) -> bool:
    fields, _ = LongspanConfig.get_config_dict(name, **hub)
    return fields.get("weights_format") == "int8_rows"


def narrow_rows(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix as int8 and a float32 scale per row (`<name>.scale`); vectors stay as they are."""
    narrow: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if weight.ndim != 2:
            narrow[name] = weight.float().contiguous()
            continue
        narrow[name], scale = Weight(weight).narrowed()
        assert scale is not None
        narrow[f"{name}.scale"] = scale
    return narrow


def widen_rows(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `narrow_rows` was given, to within half a step of each row."""
    wide = {name: weight for name, weight in weights.items() if not name.endswith(".scale")}
    for name, weight in wide.items():
        if weight.dtype == torch.int8:
            wide[name] = Weight(weight, weights[f"{name}.scale"]).widened(torch.float32)
    return wide


def span_means(hidden: Tensor, spans: Tensor) -> Tensor:
    """Mean vector of each span: hidden [B, N, C], spans Long[B, M, 2] (start, end exclusive) -> [B, M, C], fp32."""
    batch, tokens, width = hidden.shape
    first_row = torch.arange(batch, device=spans.device)[:, None] * tokens
    starts, lengths = (spans[..., 0] + first_row).flatten(), (spans[..., 1] - spans[..., 0]).flatten()
    offsets = lengths.cumsum(0) - lengths
    shifts = (starts - offsets).repeat_interleave(lengths)
    index = torch.arange(len(shifts), device=spans.device) + shifts
    means = F.embedding_bag(index, hidden.float().flatten(0, 1), offsets, mode="mean")
    return means.view(batch, -1, width)


def best_within(scores: Tensor, spans: Tensor) -> Tensor:
    """The best score of a stretch that lies inside each span [M, 2], or that begins nearest to one too short: [M].

    scores [S]: stretch s is STRETCH tokens from s * STRETCH / 2 on.
    """
    step, final = STRETCH // 2, len(scores) - 1
    first = ((spans[:, 0] + step - 1) // step).clamp(max=final)
    last = torch.maximum(((spans[:, 1] - STRETCH) // step).clamp(max=final), first)
    best = []
    for low, high in zip(first.split(SPANS_AT_ONCE), last.split(SPANS_AT_ONCE), strict=True):
        index = low[:, None] + torch.arange(int((high - low).max()) + 1, device=scores.device)
        best.append(scores[index.minimum(high[:, None])].amax(1))
    return torch.cat(best)


def lexical_matches(question_ids: Tensor, document_ids: Tensor, spans: Tensor) -> Tensor:
    """How much of the question each span repeats, and how much it repeats with as many tokens again on either side.

    question_ids Long[Q], document_ids Long[N], spans Long[M, 2] -> fp32 [M]. Both are BM25 without its length term,
    each document its own collection: a token weighs by its inverse document frequency over the spans, and a repetition
    less than the first occurrence (Robertson and Zaragoza 2009, "The probabilistic relevance framework", equations 3.3
    and 3.15 with k1 = 1.2).
    """
    starts, ends = spans[:, 0].contiguous(), spans[:, 1].contiguous()
    lengths = ends - starts
    around = (starts - lengths).clamp(min=0), (ends + lengths).clamp(max=len(document_ids))
    matches = torch.zeros(len(spans), device=spans.device)
    for token in question_ids.unique():
        places = (document_ids == token).nonzero()[:, 0]
        for first, last in ((starts, ends), around):
            frequency = torch.searchsorted(places, last) - torch.searchsorted(places, first)
            holding = (frequency > 0).sum()
            rarity = torch.log1p((len(spans) - holding + 0.5) / (holding + 0.5))
            matches += rarity * frequency / (frequency + 1.2)
    return matches


def evidence_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """-log of the softmax mass on the labelled spans, mean over the rows that have any. scores, labels [B, M]."""
    has_evidence = labels.any(1)
    mass = torch.where(labels, scores, -torch.inf)[has_evidence].logsumexp(1)
    return (scores[has_evidence].logsumexp(1) - mass).sum() / has_evidence.sum().clamp(min=1)
