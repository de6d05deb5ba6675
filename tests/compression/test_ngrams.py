import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs pip install longspan[train]")

from longspan.compression.ngrams import fit_ngrams, ngram_logits, targets_of, weight_beside

GOOD, BAD, NOT = 10, 11, 12


def rows(count, seed=0):
    """What a row says of GOOD or BAD is turned around by a NOT before it, so that no token alone tells its label."""
    rng = np.random.default_rng(seed)
    features, labels = [], []
    for _ in range(count):
        label, turned = rng.integers(2, size=2)
        word = GOOD if label != turned else BAD
        others = rng.integers(20, 40, size=rng.integers(2, 8)).tolist()
        place = int(rng.integers(len(others)))
        # A lone NOT stands elsewhere in the rows that are not turned around.
        phrase = [NOT, word] if turned else [word]
        others[place:place] = phrase
        if not turned:
            others.append(NOT)
        features.append({"input_ids": [1, *others, 2]})
        labels.append(int(label))
    return features, labels


def test_pairs_of_tokens_tell_what_tokens_alone_do_not():
    features, labels = rows(400)
    table = fit_ngrams(features, targets_of(labels, 2), buckets=4096, inverse_penalty=1.0)
    assert table.shape == (4096, 2) and table.dtype == torch.float32
    unseen, truth = rows(200, seed=1)
    said = ngram_logits(table, unseen)
    assert (said.argmax(1) == truth).mean() > 0.97
    np.testing.assert_allclose(said.sum(1), 0, atol=1e-5)
    assert torch.equal(table, fit_ngrams(features, targets_of(labels, 2), buckets=4096, inverse_penalty=1.0))


def test_of_several_labels_each_has_its_words():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=200).tolist()
    features = [{"input_ids": [1, *rng.integers(30, 60, size=5), 10 + label, 2]} for label in labels]
    features = [{"input_ids": [int(token) for token in row["input_ids"]]} for row in features]
    table = fit_ngrams(features, targets_of(labels, 4), buckets=4096)
    assert (ngram_logits(table, features).argmax(1) == labels).all()


def test_a_teachers_doubts_are_learnt():
    features = [{"input_ids": [token]} for token in (5, 6, 7) for _ in range(200)]
    sure = np.repeat([0.9, 0.5, 0.1], 200)
    said = ngram_logits(
        fit_ngrams(features, np.stack((1 - sure, sure), 1), buckets=64, inverse_penalty=100.0), features
    )
    found = 1 / (1 + np.exp(said[:, 0] - said[:, 1]))
    np.testing.assert_allclose(found, sure, atol=0.02)


def test_targets_are_the_labels_and_half_of_what_a_teacher_says():
    assert targets_of([1, 0], 2).tolist() == [[0, 1], [1, 0]]
    logits = np.array([[2.0, 0.0], [0.0, 4.0]])
    said = np.exp(logits / 2) / np.exp(logits / 2).sum(1, keepdims=True)
    np.testing.assert_allclose(targets_of([0, 1], 2, logits), (np.eye(2) + said) / 2)


def test_the_better_voice_is_the_louder():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=4000)
    signs = 2 * labels - 1

    def voice(scale, noise):
        score = scale * (signs + noise * rng.standard_normal(len(labels)))
        return np.stack((-score, score), 1)

    sharp, dull, useless = voice(1, 0.5), voice(1, 1.0), voice(0, 0) + rng.standard_normal((len(labels), 1)) * [1, -1]
    # The best weight of independent normal voices is the inverse of their variances.
    assert weight_beside(sharp, dull, labels) == pytest.approx(0.25, rel=0.15)
    assert weight_beside(3 * sharp, dull, labels) == pytest.approx(0.75, rel=0.15)
    assert weight_beside(sharp, useless, labels) == pytest.approx(0, abs=0.05)
    assert weight_beside(sharp, -dull, labels) == 0


@pytest.mark.parametrize(
    ("count", "targets", "message"),
    [
        (0, np.zeros((0, 2)), "at least 2 probabilities for each of at least 1 rows"),
        (2, np.zeros((3, 2)), r"got \[3, 2\] for 2 rows"),
        (2, np.zeros(2), r"got \[2\] for 2 rows"),
        (2, np.ones((2, 1)), r"got \[2, 1\] for 2 rows"),
        (2, targets_of([1, 1], 2), r"labels \[0, 1\] hold for no row, or for every row"),
        (2, targets_of([0, 1], 3), r"labels \[2\] hold for no row"),
    ],
)
def test_what_teaches_nothing_is_refused(count, targets, message):
    with pytest.raises(ValueError, match=message):
        fit_ngrams([{"input_ids": [1, 2]}] * count, targets)
