"""Hugging Face's own model beside ours on the same tokens: both times, and how far the results differ."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForQuestionAnswering, PreTrainedModel

from longspan.attention import SlidingWindow
from longspan.errors import DocumentError
from longspan.inference.evidence import NO_TEXT, EvidenceFinder
from longspan.inference.extractive import Span, SpanFinder
from longspan.models.convert import to_hugging_face_longformer, to_long
from longspan.models.evidence import LongspanForEvidence
from longspan.models.heads import LongspanForQuestionAnswering
from longspan.models.model import LongspanPreTrainedModel

COMPARED_TOKENS = 16_384  # what Hugging Face's Longformer reads in some seconds and GiB
WARM_UP_TOKENS = 256

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """longspan beside Hugging Face, which computes in fp32.

    model: their class. tokens: how many of the documents' were compared. longspan_seconds, hugging_face_seconds: of the
    models alone, each run once after a short one. output_difference: the largest in `output`, "token vectors" or
    "span logits". score_difference: the largest in the probability of a passage or an answer.
    """

    model: str
    tokens: int
    longspan_seconds: float
    hugging_face_seconds: float
    output: str
    output_difference: float
    score_difference: float

    @property
    def speedup(self) -> float:
        return self.hugging_face_seconds / self.longspan_seconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"speedup": self.speedup}


@torch.inference_mode()
def compare(
    finder: EvidenceFinder | SpanFinder,
    source: str,
    question: str,
    texts: Sequence[str],
    *,
    passage_words: int = 100,
    max_tokens: int = COMPARED_TOKENS,
) -> Comparison:
    """longspan beside Hugging Face on the first `max_tokens` tokens of the texts.

    source: where the finder's model came from. Raises NotImplementedError for what transformers cannot express or
    computes already, ValueError for a checkpoint of packed weights.
    """
    config = finder.model.config
    if getattr(config, "precision", None) is not None:
        raise ValueError(
            f"model {source} holds weights packed in {config.precision}, which transformers cannot read; "
            "compare the model that it was made from."
        )
    if not isinstance(finder.model, LongspanPreTrainedModel):
        raise NotImplementedError(f"model {source} runs on transformers itself, so there is nothing to compare.")
    if isinstance(finder, SpanFinder):
        return _compare_spans(finder, _stock_reader(finder, source), question, texts, max_tokens)
    return _compare_evidence(finder, source, question, texts, passage_words, max_tokens)


def _compare_evidence(
    finder: EvidenceFinder, source: str, question: str, texts: Sequence[str], passage_words: int, max_tokens: int
) -> Comparison:
    """The vectors of all tokens, and the probabilities of all passages that both computed."""
    model, question_ids = finder.model, finder.tokenize_question(question)
    lengths = torch.tensor([len(question_ids)], device=model.device)
    body = LongspanForEvidence.from_pretrained(source).longspan
    body.config.pooler = False  # whatever the encoder was made from had: the reader's has none
    stock = _as_longformer(body, len(question_ids) + max_tokens)
    stock.to(model.device)

    def read_ours(row: Tensor) -> tuple[Tensor, Tensor]:
        return model.encode(row, None, lengths)

    def read_theirs(row: Tensor) -> tuple[Tensor, Tensor]:
        is_question = (torch.arange(row.shape[1], device=row.device) < lengths)[None]
        states = stock(row, global_attention_mask=is_question.long()).last_hidden_state
        return states, stock(question_ids[None]).last_hidden_state.mean(1)

    readers, seconds = (read_ours, read_theirs), [0.0, 0.0]
    logits: tuple[list[Tensor], list[Tensor]] = [], []
    tokens, difference = 0, 0.0
    for text in texts:
        reading = finder.prepare(text, passage_words)
        token_ids = torch.from_numpy(reading.token_ids[: max_tokens - tokens]).to(model.device)
        spans = torch.from_numpy(reading.spans[reading.spans[:, 1] <= len(token_ids)]).to(model.device)
        row = torch.cat((question_ids, token_ids))[None]
        vectors = []
        for side, read in enumerate(readers):
            if not tokens:
                read(row[:, : len(question_ids) + WARM_UP_TOKENS])
            (states, asked), taken = _timed(lambda read=read, row=row: read(row))
            seconds[side] += taken
            vectors.append(states)
            if len(spans):
                parts = model.parts_of(states[:, len(question_ids) :], asked, question_ids, token_ids, spans)
                logits[side].append(model.weigh(parts))
        difference = max(difference, float((vectors[0].float() - vectors[1]).abs().max()))
        tokens += len(token_ids)
        if tokens == max_tokens:
            break
    if not logits[0]:
        raise DocumentError(NO_TEXT)
    ours, theirs = (model.passage_probability(torch.cat(side)) for side in logits)
    return Comparison(
        model=type(stock).__name__,
        tokens=tokens,
        longspan_seconds=seconds[0],
        hugging_face_seconds=seconds[1],
        output="token vectors",
        output_difference=difference,
        score_difference=float((ours - theirs).abs().max()),
    )


def _compare_spans(
    finder: SpanFinder, stock: PreTrainedModel, question: str, texts: Sequence[str], max_tokens: int
) -> Comparison:
    """The logits and the probabilities of the best spans of every window."""
    other = SpanFinder(stock.to(finder.model.device), finder.tokenizer)
    other.window_tokens = finder.window_tokens
    windows, room = other.windows(question, texts)[0], max_tokens
    for number, window in enumerate(windows):
        room -= len(window.offsets)
        if room < 0:
            windows = windows[: max(1, number)]
            break
    logits, seconds = [], []
    for side in (finder, other):
        side.span_logits(windows[:1])
        found, taken = _timed(lambda side=side: side.span_logits(windows))
        logits.append(found)
        seconds.append(taken)
    ours, theirs = (_probabilities(found) for found in logits)
    tokens = {
        (window.document, place)
        for window in windows
        for place, is_context in zip(window.offsets, window.is_context, strict=True)
        if is_context
    }
    return Comparison(
        model=type(stock).__name__,
        tokens=len(tokens),
        longspan_seconds=seconds[0],
        hugging_face_seconds=seconds[1],
        output="span logits",
        output_difference=max(abs(logits[0][span] - logits[1][span]) for span in ours.keys() & theirs.keys()),
        score_difference=max(abs(ours.get(span, 0) - theirs.get(span, 0)) for span in ours.keys() | theirs.keys()),
    )


def _probabilities(logits: dict[Span, float]) -> dict[Span, float]:
    return dict(zip(logits, torch.tensor(list(logits.values()), dtype=torch.float64).softmax(0).tolist(), strict=True))


def _timed(run: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def _stock_reader(finder: SpanFinder, source: str) -> PreTrainedModel:
    """The question-answering checkpoint as transformers computes it."""
    if AutoConfig.from_pretrained(source).model_type != "longspan":
        stock: Any = AutoModelForQuestionAnswering
        return stock.from_pretrained(source, use_safetensors=True, dtype=torch.float32).eval()
    stock = _as_longformer(LongspanForQuestionAnswering.from_pretrained(source), finder.window_tokens)

    def mark_global_tokens(_: Any, arguments: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Left to itself, Longformer's head insists on RoBERTa's three separators in a row.
        ids, ours = inputs["input_ids"], finder.model
        chooses = ours.described.global_tokens is not None
        marked = ours.choose_global_tokens(ids, None, None).long() if chooses else torch.zeros_like(ids)
        return arguments, inputs | {"global_attention_mask": marked}

    stock.register_forward_pre_hook(mark_global_tokens, with_kwargs=True)
    return stock


def _as_longformer(model: LongspanPreTrainedModel, max_tokens: int) -> PreTrainedModel:
    """transformers' own Longformer with the same weights; positions that repeat are written out to `max_tokens`."""
    patterns = [block.pattern for block in model.config.encoder_config.blocks]
    windows = [2 * pattern.before for pattern in patterns if isinstance(pattern, SlidingWindow)]
    if model.config.embeddings_config.position_period is not None and len(windows) == len(patterns):
        model = to_long(model, max_tokens=max_tokens, window=windows)
    return to_hugging_face_longformer(model).eval()
