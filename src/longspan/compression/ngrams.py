"""A linear model of n-grams, fitted and put beside the encoder of a classifier.

Tokens and pairs of neighbors are counted, weighed by how much likelier they are where a label holds, and a logistic
regression learns the rest: Wang and Manning's "Baselines and Bigrams" (2012). Labels may be what a teacher says.

Shapes: n rows, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from longspan.compression.teacher_outputs import Features
from longspan.models.convert import as_ours
from longspan.models.heads import LongspanForSequenceClassification
from longspan.models.ngrams import NgramLogits, ngram_buckets

Array = NDArray[Any]
BUCKETS = 2**20


def targets_of(labels: Sequence[int], count: int, taught: Array | None = None, *, temperature: float = 2.0) -> Array:
    """The probabilities [n, count] that `fit_ngrams` learns: those of the labels or, where a teacher's logits
    taught [n, count] come, the mean of those and of the teacher's at a temperature."""
    hard = np.eye(count)[np.asarray(labels)]
    if taught is None:
        return hard
    return (hard + torch.from_numpy(np.asarray(taught, np.float64) / temperature).softmax(1).numpy()) / 2


def fit_ngrams(features: Features, targets: Array, *, buckets: int = BUCKETS, inverse_penalty: float = 0.1) -> Tensor:
    """The table of an `NgramLogits`, fp32[buckets, L].

    features: rows of token ids, not padded. targets: [n, L], the probability of each label, such as 0 and 1.
    inverse_penalty: scikit-learn's C; the smaller, the less single n-grams may say.
    Raises ImportError without scikit-learn, ValueError for no rows, for targets of another shape, and for a label that
    no row has, or every row.
    """
    try:
        from scipy import sparse
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("scikit-learn is not installed; pip install longspan[train]") from error
    targets = np.asarray(targets, np.float64)
    if not len(features) or targets.ndim != 2 or len(targets) != len(features) or targets.shape[1] < 2:
        raise ValueError(
            f"targets must be [n, L], at least 2 probabilities for each of at least 1 rows; got {list(targets.shape)} "
            f"for {len(features)} rows"
        )
    lacking = [label for label, column in enumerate(targets.T) if column.sum() in (0, len(column))]
    if lacking:
        raise ValueError(f"labels {lacking} hold for no row, or for every row: n-grams cannot tell them from others")
    counts = _counts(features, buckets)

    def fit(likely: Array) -> Array:
        """What each n-gram says for a label, against all others."""
        with_label, without = (counts.T @ weight + 1 for weight in (likely, 1 - likely))
        ratio = np.log((with_label / likely.sum()) / (without / (1 - likely).sum()))
        # A row that is likely to have the label is one with it and, with the rest of its weight, one without.
        weights = np.concatenate((likely, 1 - likely))
        rows = sparse.vstack((counts, counts)).tocsr()[weights > 0] @ sparse.diags(ratio)
        has = np.repeat((1, 0), len(likely))[weights > 0]
        regression = LogisticRegression(C=inverse_penalty, solver="liblinear", fit_intercept=False, random_state=0)
        return ratio * regression.fit(rows, has, sample_weight=weights[weights > 0]).coef_[0]

    if targets.shape[1] == 2:
        said = fit(targets[:, 1])
        table = np.stack((-said / 2, said / 2), 1)
    else:
        table = np.stack([fit(column) for column in targets.T], 1)
    return torch.from_numpy(table.astype(np.float32))


def ngram_logits(table: Tensor, features: Features) -> NDArray[np.float32]:
    """What a table says of rows, [n, L]."""
    module = NgramLogits(*table.shape)
    with torch.no_grad():
        module.weight.copy_(table)
        return np.concatenate([module(torch.tensor([row["input_ids"]])).numpy() for row in features])


def weight_beside(logits: Array, said: Array, labels: Sequence[int]) -> float:
    """How much of what n-grams say to add to a model's logits, at least 0: where rows that neither has learnt from are
    likeliest. logits, said: [n, L]; labels: Long[n].

    The model's logits may be scaled, too, while this is sought: only the proportion of both decides which label wins.
    """
    from scipy.optimize import minimize

    chosen = np.asarray(labels)[:, None]

    def surprise(weights: Array) -> float:
        mixed = weights[0] * logits + weights[1] * said
        mixed = mixed - mixed.max(1, keepdims=True)
        return float(np.mean(np.log(np.exp(mixed).sum(1)) - np.take_along_axis(mixed, chosen, 1)[:, 0]))

    found = minimize(surprise, (1.0, 0.5), bounds=((1e-3, None), (0, None))).x
    return float(found[1] / found[0])


def with_ngrams(model: PreTrainedModel, table: Tensor) -> LongspanForSequenceClassification:
    """A copy of a classifier, of ours, that adds what the table says to its logits; in place of an earlier table.

    model: ours, or a BERT, RoBERTa, DistilBERT, Longformer or ModernBERT of transformers, as a classifier of sequences.
    Raises ValueError for another head and for a table of other labels, NotImplementedError for other families.
    """
    ours: Any = as_ours(model)
    if not isinstance(ours, LongspanForSequenceClassification):
        raise ValueError(f"n-grams are heard by classifiers of sequences; got {type(ours).__name__}")
    if table.shape[1] != ours.num_labels:
        raise ValueError(f"the table speaks of {table.shape[1]} labels, and the model has {ours.num_labels}")
    config = type(ours.config).from_dict(ours.config.to_dict() | {"ngram_buckets": len(table)})
    other: Any = LongspanForSequenceClassification(config)
    other.to(device=ours.device, dtype=ours.dtype)
    other.load_state_dict(ours.state_dict() | {"ngrams.weight": table})
    return other.train(ours.training)


def _counts(features: Features, buckets: int) -> Any:
    """How often each row has the n-grams of each bucket: a sparse matrix [n, buckets]."""
    from scipy import sparse

    places, ends = [], [0]
    for row in features:
        found, _ = ngram_buckets(torch.tensor([row["input_ids"]]), None, buckets)
        places.append(found[0].numpy())
        ends.append(ends[-1] + found.shape[1])
    counts = sparse.csr_matrix(
        (np.ones(ends[-1]), np.concatenate(places), ends), shape=(len(features), buckets), dtype=np.float64
    )
    counts.sum_duplicates()
    return counts
