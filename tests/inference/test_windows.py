import numpy as np
import pytest

from longspan.inference.windows import candidate_windows, select_disjoint, tokenize_words, word_spans, words_around

TEXT = "The red zebra\u00a0lives,\n\n in\tthe zoo \u200b near [SEP] the [MASK] River!"


@pytest.mark.parametrize("text", [TEXT, "", " \n", "one", " one ", "a\u2003b\x1cc\u0085d"])
def test_words_are_those_of_str_split(text):
    assert [text[start:end] for start, end in word_spans(text)] == text.split()


def test_tokens_equal_those_of_the_running_text(tokenizer):
    token_ids, first, words = tokenize_words(tokenizer, TEXT)
    expected = tokenizer(TEXT, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert token_ids.tolist() == expected
    assert len(first) == len(words) + 1
    assert first[-1] == len(token_ids)


def test_every_word_owns_its_own_tokens(tokenizer):
    token_ids, first, words = tokenize_words(tokenizer, TEXT)
    for index, (start, end) in enumerate(words):
        own = tokenizer(TEXT[start:end], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert token_ids[first[index] : first[index + 1]].tolist() == own
    zero_width = TEXT.split().index("\u200b")
    assert first[zero_width] == first[zero_width + 1]


def test_a_document_cannot_inject_special_tokens(tokenizer):
    token_ids, _, _ = tokenize_words(tokenizer, "a [SEP] b [CLS] c [PAD]")
    assert not set(token_ids.tolist()) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def test_no_words_give_empty_arrays(tokenizer):
    token_ids, first, words = tokenize_words(tokenizer, " \n")
    assert (token_ids.shape, first.tolist(), words.shape) == ((0,), [0], (0, 2))


@pytest.mark.parametrize("num_words", [1, 9, 10, 11, 14, 15, 16, 100])
def test_windows_cover_every_word_and_end_with_the_document(num_words):
    windows = candidate_windows(num_words, length=10, stride=5)
    assert set().union(*(range(start, end) for start, end in windows)) == set(range(num_words))
    assert windows[-1, 1] == num_words
    assert ((windows[:, 1] - windows[:, 0]) == min(10, num_words)).all()
    assert (np.diff(windows[:, 0]) > 0).all()


def test_windows_of_nothing_and_of_bad_sizes():
    assert candidate_windows(0).shape == (0, 2)
    with pytest.raises(ValueError, match="at least 1; got length=0, stride=10"):
        candidate_windows(5, length=0)


def test_selection_takes_the_best_and_then_what_does_not_overlap():
    windows = [(0, 10), (5, 15), (10, 20), (18, 28), (20, 30)]
    assert select_disjoint(windows, [1.0, 5.0, 4.0, 3.0, 2.0], top=3) == [1, 3]
    assert select_disjoint(windows, [1.0, 0.5, 4.0, 3.0, 2.0], top=3) == [2, 4, 0]
    assert select_disjoint(windows, [1.0, 1.0, 1.0, 1.0, 1.0], top=2) == [0, 2]
    assert select_disjoint(windows, [-np.inf] * 5, top=2) == []
    assert select_disjoint(np.empty((0, 2), int), [], top=3) == []


def test_selection_leaves_the_scores_as_they_were():
    scores = np.array([1.0, 2.0])
    select_disjoint([(0, 5), (3, 8)], scores, top=2)
    assert scores.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("chars", "expected"),
    [((0, 2), (0, 5)), ((57, 59), (15, 20)), ((30, 32), (8, 13)), ((30, 35), (9, 14)), ((30, 59), (10, 15))],
    ids=["start", "end", "middle", "two words", "longer than the passage"],
)
def test_words_around_a_span(chars, expected):
    words = word_spans("ab " * 20)
    assert words_around(words, np.array([chars]), length=5).tolist() == [list(expected)]


def test_words_around_a_span_of_a_short_text():
    words = word_spans("one two three")
    assert words_around(words, np.array([[5, 6]]), length=5).tolist() == [[0, 3]]
