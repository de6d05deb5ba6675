from types import SimpleNamespace

import pytest
import torch

from longspan.errors import DocumentError, NotFiniteError, QuestionError
from longspan.inference.evidence import EvidenceFinder


class CountsZebras:
    """An evidence reader whose score is the number of zebras in a window."""

    device = torch.device("cpu")
    config = SimpleNamespace(embeddings_config=SimpleNamespace(position_period=64, max_tokens=None))

    def __init__(self, tokenizer):
        self.zebra = tokenizer.convert_tokens_to_ids("zebra")

    def score_windows(self, question_ids, document_ids, spans, *, progress=None):
        progress and progress(len(document_ids), len(document_ids))
        return torch.stack([(document_ids[start:end] == self.zebra).sum() for start, end in spans.tolist()]).float()

    def passage_probability(self, scores):
        return scores / (1 + scores)


def find(model, tokenizer, *texts, question="who lives in the zoo", **kwargs):
    return EvidenceFinder(model, tokenizer).candidates(question, list(texts), passage_words=20, **kwargs)


def test_the_best_window_holds_the_evidence_and_no_answer_is_made_up(tokenizer):
    texts = ["old " * 300, "old " * 200 + "zebra zebra " + "unknown words " * 30]
    found = find(CountsZebras(tokenizer), tokenizer, *texts)
    rank = found.probability.argmax()
    start, end = found.chars[rank]
    assert found.answer is None
    assert found.document[rank] == 1
    assert texts[1][start:end].split().count("zebra") == 2
    assert len(texts[1][start:end].split()) == 20
    assert found.probability[rank] == pytest.approx(2 / 3)


def test_words_are_numbered_through_all_documents(tokenizer):
    found = find(CountsZebras(tokenizer), tokenizer, "old " * 15, "zebra " * 45)
    assert found.words.tolist() == [[0, 15], [15, 35], [25, 45], [35, 55], [40, 60]]


def test_tokens_and_progress_count_all_documents(tokenizer):
    calls = []
    found = find(
        CountsZebras(tokenizer),
        tokenizer,
        "old " * 15,
        "xyz " * 5,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert found.tokens == 15 + 3 * 5
    assert calls == [(15, 30), (30, 30)]


def test_windows_without_tokens_are_left_out(tokenizer):
    found = find(CountsZebras(tokenizer), tokenizer, "\u200b " * 30 + "zebra")
    assert len(found.probability) == 1
    with pytest.raises(DocumentError, match="no text that this model's tokenizer knows"):
        find(CountsZebras(tokenizer), tokenizer, "\u200b " * 30)


def test_a_question_longer_than_half_the_window_is_refused(tokenizer):
    find(CountsZebras(tokenizer), tokenizer, "zebra", question="who " * 30)
    with pytest.raises(QuestionError, match="33 tokens long, more than half of the 64 tokens"):
        find(CountsZebras(tokenizer), tokenizer, "zebra", question="who " * 31)


def test_a_model_that_gives_nan_is_refused(tokenizer):
    model = CountsZebras(tokenizer)
    model.score_windows = lambda *args, **kwargs: torch.tensor([torch.nan])
    with pytest.raises(NotFiniteError, match="NaN or infinite scores"):
        find(model, tokenizer, "red zebra")
