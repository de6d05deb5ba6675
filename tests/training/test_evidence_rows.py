import numpy as np
import pytest

from longspan.training.evidence_rows import interval_iou, load_articles, load_rows, load_xquad_rows, title_of


def text(articles, row, number=0):
    offset, _ = articles.bounds(row.article)
    start, end = row.evidence[number] + offset
    return " ".join(articles.texts_of(start, end))


def test_tokens_of_a_piece_are_those_of_its_text(articles, tokenizer):
    start, stop = articles.bounds(3)
    piece = " ".join(articles.texts_of(start + 2, stop - 1))
    assert list(articles.tokens_of(start + 2, stop - 1)) == tokenizer(piece, add_special_tokens=False)["input_ids"]


def test_a_cache_is_read_and_not_built_again(data, articles, tokenizer, tmp_path, monkeypatch):
    first = load_articles(data, tmp_path, tokenizer)
    monkeypatch.setattr("longspan.training.evidence_rows._build", None)
    again = load_articles(data, tmp_path, tokenizer)
    assert again.names == first.names
    assert np.array_equal(again.tokens, articles.tokens)


@pytest.mark.parametrize(("source", "split"), [("boolq_articles", "dev"), ("fever", "val"), ("multirc", "test")])
def test_evidence_points_at_its_sentence(data, articles, source, split):
    for row in load_rows(data, articles, source, split):
        assert text(articles, row).startswith("the zebra of")
        assert text(articles, row).endswith("red zoo .")


def test_treebank_brackets_and_answer_candidates_leave_the_question(data, articles):
    assert load_rows(data, articles, "fever", "val")[0].question == "the zebra lives ( in the zoo )"
    assert load_rows(data, articles, "multirc", "val")[0].question == "who lives in the zoo ?"


def test_xquad_evidence_is_the_answer_with_its_neighborhood(data, articles):
    (row,) = load_xquad_rows(data, articles)
    offset, stop = articles.bounds(row.article)
    context = articles.texts_of(offset + 2, stop)  # after the paragraph "alice wrote."
    answer = next(i for i in range(len(context)) if context[i : i + 2] == ["red", "zoo"])
    assert text(articles, row) == " ".join(context[answer - 12 : answer + 14])


def test_evaluation_articles_and_their_copies_are_marked(articles):
    marked = {name for name, repeats in zip(articles.names, articles.repeats_dev, strict=True) if repeats}
    assert marked == {"boolq_articles/a8", "boolq_articles/a9", "boolq_articles/a10", "boolq_articles/copy"}


def test_titles_are_the_leading_capitals(articles):
    assert title_of(articles, 0) == ["TITLE0"]


def test_a_missing_file_is_named(data, articles, tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"docs\.jsonl"):
        load_articles(tmp_path, tmp_path / "cache", tokenizer)
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl in .*boolq_articles"):
        load_rows(data, articles, "boolq_articles", "test")


def test_interval_iou_counts_words():
    found = interval_iou(np.array([[0, 10], [5, 15], [20, 30]]), np.array([[5, 10], [10, 20]]))
    assert np.allclose(found, [[0.5, 0], [0.5, 1 / 3], [0, 0]])
