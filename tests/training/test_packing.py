import numpy as np
import pytest

from longspan.training.evidence_rows import load_rows
from longspan.training.packing import (
    batch_rows,
    invent_question,
    join,
    natural_row,
    opening_row,
    pack_row,
    relevance,
)


@pytest.fixture(scope="module")
def row(data, articles):
    return load_rows(data, articles, "boolq_articles", "train")[3]


@pytest.fixture(scope="module")
def question(row, tokenizer):
    return np.array(tokenizer(row.question)["input_ids"])


def pack(articles, row, question, seed, room=250):
    others = np.nonzero(~articles.repeats_dev)[0]
    rng = np.random.default_rng(seed)
    return pack_row(articles, row.article, row.evidence, question[1:-1], others, room, rng)


@pytest.mark.parametrize("seed", range(20))
def test_a_packed_row_fits_and_marks_the_zebra(articles, row, question, tokenizer, seed):
    packed = pack(articles, row, question, seed)
    assert len(packed.document_ids) <= 250
    assert packed.window_labels.any()
    zebra = tokenizer.convert_tokens_to_ids("zebra")
    marked = packed.sentences[packed.sentence_labels]
    assert len(marked)
    assert all(zebra in packed.document_ids[start:end] for start, end in marked)
    for spans in (packed.windows, packed.sentences):
        assert (spans[:, 0] < spans[:, 1]).all()
        assert spans.max() <= len(packed.document_ids)


def test_natural_rows_fit_and_mark_the_zebra(articles, row, tokenizer):
    others = np.nonzero(~articles.repeats_dev)[0]
    zebra = tokenizer.convert_tokens_to_ids("zebra")
    labelled = 0
    for seed in range(20):
        natural = natural_row(articles, row.article, row.evidence, others, 250, np.random.default_rng(seed))
        assert len(natural.document_ids) <= 250
        assert zebra in natural.document_ids
        labelled += bool(natural.window_labels.any())
    assert labelled >= 18  # evidence of a few words at the very beginning may lie before the first window


def test_an_opening_row_labels_sentences_and_no_window(articles, row, tokenizer):
    start, stop = articles.bounds(row.article)
    whole = int(articles.first_token[stop] - articles.first_token[start])
    opening = opening_row(articles, row.article, row.evidence, whole)
    assert len(opening.document_ids) == whole
    assert opening.sentence_labels.any() and not opening.window_labels.any()
    assert len(opening_row(articles, row.article, row.evidence, 40).document_ids) <= 40


def test_a_packed_row_is_a_function_of_its_seed(articles, row, question):
    first, again, other = (pack(articles, row, question, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.document_ids, other.document_ids)


def test_evidence_longer_than_the_row_is_cut(articles, row, question):
    start, stop = articles.bounds(row.article)
    whole = np.array([[0, stop - start]])
    rng = np.random.default_rng(0)
    packed = pack_row(articles, row.article, whole, question, np.array([row.article]), 100, rng)
    assert 0 < len(packed.document_ids) <= 100
    assert packed.window_labels.all()


def test_windows_of_a_joined_row_are_labelled_by_overlap(articles):
    start, _ = articles.bounds(0)
    packed = join(articles, [(start + 50, start + 350)], np.array([[start + 150, start + 250]]))
    words = np.arange(0, 250, 20)
    overlap = np.minimum(words + 100, 200) - np.maximum(words, 100)
    assert np.array_equal(packed.window_labels, overlap / (200 - overlap) >= 0.4)


def test_relevance_prefers_rare_shared_words(articles, tokenizer):
    start, _ = articles.bounds(0)
    wanted = np.array(tokenizer("zebra", add_special_tokens=False)["input_ids"])
    zebra = next(i for i in range(start, start + 400) if articles.texts_of(i, i + 1) == ["zebra"])
    scores = relevance(articles, wanted, [(zebra - 3, zebra + 3), (zebra + 10, zebra + 20)])
    assert scores[0] > scores[1] == 0


def test_invented_questions_point_at_their_sentence(articles):
    for seed in range(10):
        made = invent_question(articles, 2, np.random.default_rng(seed))
        assert made is not None
        question, evidence = made
        offset, stop = articles.bounds(2)
        (start, end) = evidence[0] + offset
        text = {word.lower() for word in articles.texts_of(start, end)} | {"title2"}
        known = [word for word in question.split() if word in text]
        assert known
        assert offset <= start < end <= stop


def test_batches_pad_rows_and_spans(articles, row, question):
    rows = [(question, pack(articles, row, question, seed, room)) for seed, room in ((0, 100), (1, 250))]
    batch = batch_rows(rows, pad_id=0)
    assert batch["input_ids"].shape == batch["token_mask"].shape
    assert batch["input_ids"].shape[1] % 64 == 0
    assert (batch["input_ids"][~batch["token_mask"]] == 0).all()
    for number, (asked, packed) in enumerate(rows):
        mask = batch["window_mask"][number]
        assert np.array_equal(batch["windows"][number][mask], packed.windows + len(asked))
        assert np.array_equal(batch["window_labels"][number][mask], packed.window_labels)
        assert not batch["window_labels"][number][~mask].any()
