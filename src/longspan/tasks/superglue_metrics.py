"""The figures of the SuperGLUE tasks that are more than accuracy, as the benchmark computes them.

Source: arXiv 1905.00537, section 3; MultiRC: Khashabi et al. 2018, section 3.3; ReCoRD: arXiv 1810.12885, section 5.
In a row of a group the second of the two labels says that its answer is right.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from longspan.tasks.task import Array, Example, classification_scores, grouped


def cb_scores(examples: Sequence[Example], logits: Array) -> dict[str, float]:
    """CommitmentBank: accuracy, macro F1 and their mean."""
    scores = classification_scores(examples, logits)
    return scores | {"average": (scores["accuracy"] + scores["macro_f1"]) / 2}


def choice_scores(examples: Sequence[Example], logits: Array) -> dict[str, float]:
    """COPA: the share of groups whose best row is right."""
    chosen = best_of_groups(examples, logits)
    return {"accuracy": sum(example.label == 1 for example in chosen) / len(chosen)}


def multirc_scores(examples: Sequence[Example], logits: Array) -> dict[str, float]:
    """MultiRC: F1 over all answers of all questions (F1a), the share of questions with every answer right, their mean.

    FastFormers and others average F1 over questions instead, which is another figure (F1m).
    """
    from sklearn.metrics import f1_score

    found = logits.argmax(-1).tolist()
    gold = [example.label for example in examples]
    right = {example.id: answer == example.label for example, answer in zip(examples, found, strict=True)}
    whole = [all(right[example.id] for example in group) for group in grouped(examples)]
    f1a = float(f1_score(gold, found, zero_division=0))  # pyright: ignore[reportArgumentType]
    em = sum(whole) / len(whole)
    return {"f1a": f1a, "em": em, "average": (f1a + em) / 2}


def record_scores(
    examples: Sequence[Example], logits: Array, *, answers: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """ReCoRD: exact match and F1 of each query's best entity, the larger over its gold answers; their mean.

    answers: gold answers by group; entities whose spelling differs count as SQuAD's rules say.
    """
    chosen = best_of_groups(examples, logits)
    pairs = [(str(example.answer), answers[str(example.group)]) for example in chosen]
    em = sum(max(normalized(found) == normalized(gold) for gold in golds) for found, golds in pairs) / len(pairs)
    f1 = sum(max(word_f1(found, gold) for gold in golds) for found, golds in pairs) / len(pairs)
    return {"f1": f1, "em": em, "average": (f1 + em) / 2}


def best_of_groups(examples: Sequence[Example], logits: Array) -> list[Example]:
    """The row of each group that is right most probably; of equals the first."""
    margins = logits[:, 1] - logits[:, 0]  # the probability of label 1 rises with it
    margin = {example.id: float(margins[number]) for number, example in enumerate(examples)}
    return [max(group, key=lambda example: margin[example.id]) for group in grouped(examples)]


def normalized(answer: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    answer = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def word_f1(found: str, gold: str) -> float:
    """F1 between the words of two answers in their normal form."""
    mine, theirs = normalized(found).split(), normalized(gold).split()
    shared = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * shared / (len(mine) + len(theirs)) if shared else 0.0
