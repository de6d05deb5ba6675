import numpy as np
import pytest

from longspan.training.evidence_rows import load_rows
from longspan.training.reading import (
    calibration_error,
    document_of,
    fit_calibration,
    hits,
    summarize,
    token_spans,
)


@pytest.fixture(scope="module")
def row(data, articles):
    return load_rows(data, articles, "boolq_articles", "dev")[1]


def words_of(articles, document):
    return [word for start, end in document.pieces for word in articles.texts_of(start, end)]


def test_buried_evidence_stands_6000_words_later(articles, row):
    plain, buried = (document_of(articles, row, condition) for condition in ("as_is", "buried"))
    assert np.array_equal(buried.evidence, plain.evidence + 6000)
    assert buried.num_words == plain.num_words + 6000
    assert words_of(articles, buried)[6000:] == words_of(articles, plain)
    start, end = buried.evidence[0]
    assert "zebra" in words_of(articles, buried)[start:end]
    first, last = buried.first_token[[start, end]]
    assert np.array_equal(buried.token_ids[first:last], plain.token_ids[slice(*plain.first_token[plain.evidence[0]])])


def test_the_draw_of_fillers_depends_on_question_and_seed(articles, row, data):
    other = load_rows(data, articles, "boolq_articles", "dev")[0]
    pieces = [document_of(articles, r, "buried", seed=seed).pieces[:-1] for r, seed in ((row, 0), (row, 0), (row, 1))]
    assert pieces[0] == pieces[1] != pieces[2]
    assert document_of(articles, other, "buried").pieces[:-1] != pieces[0]
    own = articles.bounds(row.article)
    assert not any(own[0] <= start < own[1] for start, _ in pieces[0])


def test_a_cut_document_keeps_whole_words(articles, row):
    document = document_of(articles, row, "as_is")
    cut = document.cut(50)
    assert len(cut.token_ids) == cut.first_token[-1] <= 50 < document.first_token[cut.num_words + 1]


def test_token_spans_are_never_empty():
    first_token = np.array([0, 2, 2, 5, 5])  # words 1 and 3 have no tokens
    spans = token_spans(first_token, np.array([[0, 2], [1, 2], [3, 4]])).tolist()
    assert spans == [[0, 2], [2, 3], [4, 5]]


def test_a_hit_overlaps_by_a_tenth_of_the_union():
    evidence = np.array([[100, 200]])
    assert hits(np.array([[0, 100], [182, 282]]), evidence) == (False, False)
    assert hits(np.array([[0, 100], [181, 281]]), evidence) == (False, True)
    assert hits(np.array([[150, 250]]), evidence) == (True, True)
    assert hits(np.empty((0, 2), int), evidence) == (False, False)


def test_summaries_separate_late_questions():
    summary = summarize([(True, True), (False, True), (False, False)], [False, True, True])
    assert summary == {"top1": 0.3333, "top3": 0.6667, "late_top1": 0.0, "late_top3": 0.5}
    assert summarize([(True, True)], [False])["late_top1"] is None


def test_calibration_recovers_the_probabilities_that_made_the_labels():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20_000, 2))
    probabilities = 1 / (1 + np.exp(-(features @ [1.5, -0.5] + 0.3)))
    labels = rng.random(len(features)) < probabilities
    assert np.allclose(fit_calibration(features, labels), [1.5, -0.5, 0.3], atol=0.1)
    assert calibration_error(probabilities, labels) < 0.02 < 0.1 < calibration_error(np.sqrt(probabilities), labels)
