"""Figures against values computed by hand."""

import numpy as np
import pytest

from longspan.tasks.superglue_metrics import (
    cb_scores,
    choice_scores,
    multirc_scores,
    normalized,
    record_scores,
    word_f1,
)
from longspan.tasks.task import Example


def rows(*labels, groups=None, answers=None):
    return [
        Example(
            id=str(number),
            texts=("x",),
            label=label,
            group=None if groups is None else groups[number],
            answer=None if answers is None else answers[number],
        )
        for number, label in enumerate(labels)
    ]


def says(*labels, classes=2):
    return np.eye(classes)[list(labels)]


def test_cb_is_the_mean_of_accuracy_and_macro_f1():
    """Class 0: precision 2/3, recall 1, F1 0.8; class 1: F1 2/3 (1 of 2 found, no false one); class 2: 1."""
    scores = cb_scores(rows(0, 0, 1, 1, 2), says(0, 0, 0, 1, 2, classes=3))
    assert scores["accuracy"] == pytest.approx(0.8)
    assert scores["macro_f1"] == pytest.approx((0.8 + 2 / 3 + 1) / 3)
    assert scores["average"] == pytest.approx((scores["accuracy"] + scores["macro_f1"]) / 2)


def test_multirc_f1_is_over_all_answers_not_over_questions():
    """Question a: gold 1 1 0, found 1 0 0 (F1 2/3). Question b: gold 1 0, found 1 0 (F1 1). Question c: gold 0 0,
    found 1 0 (F1 0). Over all: 2 right of 3 found and 3 gold, so F1a 2/3; the mean over questions would be 5/9."""
    examples = rows(1, 1, 0, 1, 0, 0, 0, groups=list("aaabbcc"))
    scores = multirc_scores(examples, says(1, 0, 0, 1, 0, 1, 0))
    assert scores["f1a"] == pytest.approx(2 / 3)
    assert scores["em"] == pytest.approx(1 / 3)
    assert scores["average"] == pytest.approx(1 / 2)


def test_multirc_answers_of_a_question_may_stand_apart():
    scores = multirc_scores(rows(1, 0, 1, groups=["a", "b", "a"]), says(1, 0, 0))
    assert scores["em"] == pytest.approx(1 / 2)


def test_multirc_without_a_true_answer_found_is_zero_not_an_error():
    assert multirc_scores(rows(1, 0, groups=["a", "b"]), says(0, 0)) == {"f1a": 0.0, "em": 0.5, "average": 0.25}


def test_copa_takes_the_likelier_choice_even_if_both_look_wrong():
    logits = np.array([[3.0, 1.0], [2.0, 1.0], [0.0, 5.0], [0.0, 6.0]])  # margins -2 -1 | 5 6
    assert choice_scores(rows(0, 1, 1, 0, groups=list("aabb")), logits) == {"accuracy": 0.5}


def test_record_takes_the_best_entity_and_the_kindest_gold():
    """Query a: "The Bank of England" is "Bank of England!" in normal form, EM and F1 1. Query b: "Ann" against "Bob"
    (F1 0) and "Ann Lee" (precision 1, recall 1/2, F1 2/3)."""
    examples = rows(1, 0, 0, 1, groups=list("aabb"), answers=["The Bank of England", "Rome", "Ann", "Ann Lee"])
    logits = np.array([[0.0, 1.0], [0.0, 0.5], [0.0, -1.0], [0.0, -2.0]])
    answers = {"a": ("Paris", "Bank of England!"), "b": ("Bob", "Ann Lee")}
    scores = record_scores(examples, logits, answers=answers)
    assert scores["em"] == pytest.approx(1 / 2)
    assert scores["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert scores["average"] == pytest.approx((scores["em"] + scores["f1"]) / 2)


def test_the_first_of_equal_entities_is_taken():
    examples = rows(0, 1, groups=list("aa"), answers=["Ann", "Bob"])
    scores = record_scores(examples, np.zeros((2, 2)), answers={"a": ("Ann",)})
    assert scores["em"] == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("The U.S. Army", "us army"), ("  a  Zoo,\tan  OLD one ", "zoo old one"), ("Anthem", "anthem"), ("the", "")],
)
def test_squad_normal_form(answer, expected):
    assert normalized(answer) == expected


def test_word_f1_counts_repeated_words():
    """Shared: one "old"; 2 words against 3: 2 * 1 / 5."""
    assert word_f1("old old", "old red zoo") == pytest.approx(2 / 5)
    assert word_f1("Rome", "Oslo") == 0
