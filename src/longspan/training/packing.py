"""Short training rows that stand for long documents: the evidence among hard negatives, at a random place.

A natural article teaches that answers stand near its start; a packed row holds the evidence with its neighborhood,
the article's opening, the pieces of the article that share most words with the question, and pieces of other
articles, half of the time in random order. Everything is a pure function of the row and of the generator that it is
given. W words, T tokens, M windows, S sentences.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from longspan.training.evidence_rows import Array, Articles, interval_iou, title_of

WINDOW, STRIDE = 100, 20  # words; inference scores windows of the same length
LONGEST_EVIDENCE = 250  # words of one piece of evidence kept together
Span = tuple[int, int]  # words, flat indices

_QUESTION_WORDS = ("is", "are", "was", "does", "do", "can", "did", "has", "is there", "what", "how", "who", "")
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the of in on at by for to from with and or but as is are was were be been being it its he she they his "
        "her their this that these those which who whom whose not no has have had do does did will would can could "
        "may might also than then there when where while",
    )
)


class PackedRow(NamedTuple):
    """document_ids [T]; windows [M, 2] and sentences [S, 2] as token ranges; labels [M] and [S], True = evidence."""

    document_ids: Array
    windows: Array
    window_labels: Array
    sentences: Array
    sentence_labels: Array


def relevance(articles: Articles, question_ids: Array, spans: list[Span]) -> Array:
    """Words shared with the question, rare ones counting more and repetition saturating as in BM25. [len(spans)]"""
    wanted = np.unique(question_ids)
    scores = np.empty(len(spans))
    for number, (start, end) in enumerate(spans):
        frequency = (articles.tokens_of(start, end)[None] == wanted[:, None]).sum(1)
        scores[number] = (articles.idf[wanted] * frequency / (frequency + 1.2)).sum()
    return scores


def pack_row(
    articles: Articles,
    article: int,
    evidence: Array,
    question_ids: Array,
    others: Array,
    room: int,
    rng: np.random.Generator,
) -> PackedRow:
    """A row of at most `room` tokens around one piece of `evidence` [G, 2] (words of the article).

    others: articles that fillers may come from.
    """
    offset, stop = articles.bounds(article)
    evidence = np.asarray(evidence) + offset
    start, end = rng.choice(evidence)
    end = min(end, start + LONGEST_EVIDENCE)
    spans = [(max(offset, start - int(rng.integers(0, 90))), min(stop, end + int(rng.integers(0, 90))))]
    spans += _own_negatives(articles, (offset, stop), evidence, spans[0], question_ids, rng)
    spans = _fit(articles, spans, (start, end), room)
    room -= sum(_tokens(articles, span) for span in spans)
    if room > 60:
        spans += _foreign_negatives(articles, others, question_ids, room, rng)
    if rng.random() < 0.5:
        spans = [spans[i] for i in rng.permutation(len(spans))]
    else:  # the article's pieces in their order, somewhere among the others
        own = sorted(span for span in spans if offset <= span[0] < stop)
        foreign = [span for span in spans if not offset <= span[0] < stop]
        place = int(rng.integers(0, len(foreign) + 1))
        spans = foreign[:place] + own + foreign[place:]
    return join(articles, spans, evidence, phase=int(rng.integers(0, STRIDE)))


def natural_row(
    articles: Articles, article: int, evidence: Array, others: Array, room: int, rng: np.random.Generator
) -> PackedRow:
    """A row of at most `room` tokens as documents are: the article, whole or a long stretch, often behind others.

    evidence, others: as `pack_row` takes them.
    """
    offset, stop = articles.bounds(article)
    first = articles.first_token
    evidence = np.asarray(evidence) + offset
    start, end = rng.choice(evidence)
    end = min(end, start + LONGEST_EVIDENCE)
    begin = offset
    if first[end] - first[offset] > room - 50 or rng.random() < 0.3:
        earliest = max(offset, int(np.searchsorted(first, first[end] - room + 50)))
        begin = int(rng.integers(min(earliest, start), start + 1))
    left = room - int(first[end] - first[begin])
    before = _stretches(articles, others, int(rng.integers(0, left)), rng) if left > 100 and rng.random() < 0.7 else []
    left = room - sum(_tokens(articles, span) for span in before)
    last = min(stop, _end_within(articles, begin, left))
    if last > end and rng.random() < 0.35:
        last = int(rng.integers(end, last + 1))
    (own,) = _fit(articles, [(begin, max(last, begin + 1))], (start, end), left)
    after = _stretches(articles, others, left - _tokens(articles, own), rng)
    return join(articles, [*before, own, *after], evidence, phase=int(rng.integers(0, STRIDE)))


def opening_row(articles: Articles, article: int, evidence: Array, room: int) -> PackedRow:
    """The beginning of an article, as much as fits, with its sentences labelled but no window.

    Of short articles, where most windows would hold the evidence. What evidence lies beyond is not labelled.
    """
    offset, stop = articles.bounds(article)
    row = join(articles, [(offset, min(stop, _end_within(articles, offset, room)))], np.asarray(evidence) + offset)
    return row._replace(window_labels=np.zeros_like(row.window_labels))


def join(articles: Articles, spans: list[Span], evidence: Array, *, phase: int = 0) -> PackedRow:
    """Pieces of articles one after the other, with the windows and sentences of the whole labelled.

    evidence [G, 2]: flat words. phase: first word of the first window.
    """
    tokens, lengths, found, sentences = [], [], [], []
    words = 0
    for start, end in spans:
        tokens.append(articles.tokens_of(start, end))
        lengths.append(np.diff(articles.first_token[start : end + 1]))
        sentences.append(articles.sentence_starts(start, end) - start + words)
        for first, last in evidence:
            first, last = max(first, start), min(last, end)
            if last - first > 4:
                found.append((first - start + words, last - start + words))
        words += end - start
    first_token = np.concatenate(([0], np.cumsum(np.concatenate(lengths))))
    first = np.arange(phase, max(phase + 1, words - WINDOW // 2), STRIDE).clip(max=max(0, words - 1))
    windows = np.stack((first, np.minimum(first + WINDOW, words)), 1)
    bounds = np.append(np.concatenate(sentences), words)
    sentence_spans = np.stack((bounds[:-1], bounds[1:]), 1)
    gold = np.array(found or [(0, 0)])
    overlap = interval_iou(windows, gold).max(1)
    within = (
        np.minimum(sentence_spans[:, None, 1], gold[None, :, 1])
        - np.maximum(sentence_spans[:, None, 0], gold[None, :, 0])
    ).max(1)
    return PackedRow(
        document_ids=np.concatenate(tokens),
        windows=_in_tokens(first_token, windows),
        window_labels=overlap >= max(0.02, min(0.4, 0.5 * overlap.max())),
        sentences=_in_tokens(first_token, sentence_spans),
        sentence_labels=within >= 0.5 * (sentence_spans[:, 1] - sentence_spans[:, 0]),
    )


def invent_question(articles: Articles, article: int, rng: np.random.Generator) -> tuple[str, Array] | None:
    """A question that a sentence of an article answers, and where: inverse cloze (Lee et al. 2019, section 4).

    The question is the title and some words of the sentence in the style of a search query. evidence [1, 2]: the
    sentence with some of its neighborhood, as words of the article. None for articles too short.
    """
    offset, stop = articles.bounds(article)
    starts = np.append(articles.sentence_starts(offset, stop), stop)
    lengths = np.diff(starts)
    candidates = np.nonzero((lengths >= 12) & (lengths <= 60))[0]
    if len(candidates) < 3:
        return None
    choice = int(rng.choice(candidates[: max(3, len(candidates) // 4)] if rng.random() < 0.25 else candidates))
    start, end = int(starts[choice]), int(starts[choice + 1])
    words = [word.lower() for word in articles.texts_of(start, end) if re.search(r"\w", word)]
    content = [word for word in words if word not in _STOP_WORDS]
    if len(content) < 4:
        return None
    kept = rng.random(len(words)) < rng.uniform(0.25, 0.6)
    chosen = [
        word for word, keep in zip(words, kept, strict=True) if keep and (word not in _STOP_WORDS or rng.random() < 0.6)
    ][:9]
    if not any(word in content for word in chosen):
        chosen = [str(rng.choice(content))]
    title = [word.lower() for word in title_of(articles, article) if re.search(r"\w", word)]
    question = [str(rng.choice(_QUESTION_WORDS))]
    if rng.random() < 0.8:
        question += title[:6] + chosen if rng.random() < 0.6 else chosen + title[:6]
    else:
        question += chosen
    margin = int(rng.integers(10, 45))
    evidence = (max(offset, start - margin) - offset, min(stop, end + margin) - offset)
    return " ".join(question).strip(), np.array([evidence])


def _tokens(articles: Articles, span: Span) -> int:
    return int(articles.first_token[span[1]] - articles.first_token[span[0]])


def _end_within(articles: Articles, start: int, room: int) -> int:
    """The word after the last that ends within `room` tokens of the beginning of `start`."""
    return int(np.searchsorted(articles.first_token, articles.first_token[start] + room, "right")) - 1


def _stretches(articles: Articles, others: Array, room: int, rng: np.random.Generator) -> list[Span]:
    """Stretches of 200 to 2,500 tokens of other articles, half of them from the opening, until `room` is full."""
    spans: list[Span] = []
    while room > 60:
        start, stop = articles.bounds(int(rng.choice(others)))
        if rng.random() < 0.5:
            start += int(rng.integers(0, max(1, stop - start - 60)))
        end = min(stop, _end_within(articles, start, min(room, int(rng.integers(200, 2500)))))
        if end - start >= 20:
            spans.append((start, end))
            room -= _tokens(articles, spans[-1])
    return spans


def _fit(articles: Articles, spans: list[Span], evidence: Span, room: int) -> list[Span]:
    """As many of the spans as fit, in their order; the first is cut around the evidence when it alone is too long."""
    start, end = spans[0]
    while _tokens(articles, (start, end)) > room:
        if evidence[0] - start >= end - evidence[1] and start < evidence[0]:
            start += max(1, (evidence[0] - start) // 4)
        elif end > evidence[1]:
            end -= max(1, (end - evidence[1]) // 4)
        else:
            end -= max(1, (end - start) // 8)
    kept, room = [(start, end)], room - _tokens(articles, (start, end))
    for span in spans[1:]:
        if _tokens(articles, span) <= room:
            kept.append(span)
            room -= _tokens(articles, span)
    return kept


def _own_negatives(articles, bounds: Span, evidence: Array, taken: Span, question_ids: Array, rng) -> list[Span]:
    """Pieces of the article without evidence: its opening, those that resemble the question, a few at random."""
    offset, stop = bounds
    length = int(rng.integers(90, 150))
    phase = int(rng.integers(60, 120))
    pieces = [(offset, min(stop, offset + length))]
    pieces += [(i, min(stop, i + length)) for i in range(offset + phase, stop - 30, length)]
    hidden = np.vstack((evidence, [taken]))
    pieces = [piece for piece in pieces if not ((hidden[:, 0] < piece[1]) & (hidden[:, 1] > piece[0])).any()]
    if not pieces:
        return []
    order = np.argsort(-relevance(articles, question_ids, pieces), kind="stable")
    chosen = [0] if pieces[0][0] == offset and rng.random() < 0.8 else []
    hard, easy = (2, 0) if rng.random() < 0.5 else (4, 2)  # few leave room for other articles
    for number in rng.permutation(order[:7])[:hard]:
        if number not in chosen:
            chosen.append(int(number))
    rest = [int(number) for number in rng.permutation(order) if number not in chosen]
    return [pieces[number] for number in chosen + rest[:easy]]


def _foreign_negatives(articles, others: Array, question_ids: Array, room: int, rng) -> list[Span]:
    """Pieces of other articles, half of them openings; of two dozen at random those most like the question first."""
    pool: list[Span] = []
    for article in rng.choice(others, 24):
        start, stop = articles.bounds(article)
        if rng.random() < 0.5:
            start += int(rng.integers(0, max(1, stop - start - 60)))
        pool.append((start, min(stop, start + int(rng.integers(90, 150)))))
    order = np.argsort(-relevance(articles, question_ids, pool), kind="stable")
    order = np.concatenate((order[:3], rng.permutation(order[3:])))
    chosen: list[Span] = []
    for number in order:
        start, end = pool[number]
        end = min(end, _end_within(articles, start, room))
        if end - start < 15:
            continue
        chosen.append((start, end))
        room -= _tokens(articles, (start, end))
        if room < 60:
            break
    return chosen


def _in_tokens(first_token: Array, spans: Array) -> Array:
    """Word ranges as token ranges, none of them empty."""
    ranges = first_token[spans]
    ranges[:, 1] = np.maximum(ranges[:, 1], ranges[:, 0] + 1)
    return ranges.clip(max=first_token[-1])


def pad_spans(spans: list[Array], labels: list[Array]) -> tuple[Array, Array, Array]:
    """Ragged spans and labels -> (spans [B, M, 2], span_mask [B, M], labels [B, M])."""
    most = max(len(part) for part in spans)
    padded = np.tile(np.array([0, 1]), (len(spans), most, 1))
    mask, marked = np.zeros((len(spans), most), bool), np.zeros((len(spans), most), bool)
    for row, (part, label) in enumerate(zip(spans, labels, strict=True)):
        padded[row, : len(part)], mask[row, : len(part)], marked[row, : len(part)] = part, True, label
    return padded, mask, marked


def batch_rows(rows: list[tuple[Array, PackedRow]], pad_id: int) -> dict[str, Any]:
    """(question with its special tokens, packed row) pairs as arrays for `LongspanForEvidence`."""
    length = max(len(question) + len(row.document_ids) for question, row in rows)
    length = -(-length // 64) * 64  # few distinct shapes keep allocations and compiled code reusable
    input_ids = np.full((len(rows), length), pad_id)
    for number, (question, row) in enumerate(rows):
        joined = np.concatenate((question, row.document_ids))
        input_ids[number, : len(joined)] = joined
    question_lengths = np.array([len(question) for question, _ in rows])
    token_lengths = question_lengths + np.array([len(row.document_ids) for _, row in rows])
    windows = pad_spans([row.windows + len(question) for question, row in rows], [row.window_labels for _, row in rows])
    sentences = pad_spans(
        [row.sentences + len(question) for question, row in rows], [row.sentence_labels for _, row in rows]
    )
    return {
        "input_ids": input_ids,
        "token_mask": np.arange(length) < token_lengths[:, None],
        "question_lengths": question_lengths,
        **dict(zip(("windows", "window_mask", "window_labels"), windows, strict=True)),
        **dict(zip(("sentences", "sentence_mask", "sentence_labels"), sentences, strict=True)),
    }
