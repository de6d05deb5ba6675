from types import SimpleNamespace

import pytest
import torch
from tests.inference.test_reader import (  # noqa: F401
    SIZES,
    TEXT,
    checkpoint,
    evidence_checkpoint,
    saved,
)
from transformers import BertForQuestionAnswering, ElectraConfig, ElectraForQuestionAnswering

from longspan import Reader, to_long
from longspan.errors import QuestionError
from longspan.inference.compare import compare

QUESTION = "who wrote the report?"
TEXTS = [TEXT, "the zebra lives in the red zoo. " * 30]


@pytest.fixture(scope="module")
def evidence_reader(evidence_checkpoint):  # noqa: F811
    return Reader(evidence_checkpoint, precision="fp32")


def test_the_evidence_reader_equals_hugging_faces_longformer(evidence_reader):
    comparison = evidence_reader.compare(QUESTION, TEXTS)
    assert comparison.model == "LongformerModel"
    assert comparison.tokens == evidence_reader.answer(QUESTION, TEXTS).tokens
    assert comparison.output == "token vectors"
    assert comparison.output_difference < 1e-4
    assert comparison.score_difference < 1e-4
    data = comparison.to_dict()
    assert data["speedup"] == data["hugging_face_seconds"] / data["longspan_seconds"] > 0


def test_differences_are_the_largest_that_there_are(evidence_checkpoint):  # noqa: F811
    reader = Reader(evidence_checkpoint, precision="fp32")
    with torch.no_grad():
        reader._finder.model.longspan.embeddings.norm.bias += 0.1
    comparison = reader.compare(QUESTION, TEXTS)
    assert comparison.output_difference > 0.01
    assert 0 < comparison.score_difference <= 1


def test_long_documents_are_compared_from_their_beginning(evidence_reader):
    texts = [TEXTS[1], TEXT * 3]
    within_first, within_second = (
        compare(evidence_reader._finder, evidence_reader.source, QUESTION, texts, passage_words=20, max_tokens=tokens)
        for tokens in (100, 400)
    )
    assert (within_first.tokens, within_second.tokens) == (100, 400)
    assert max(within_first.score_difference, within_second.score_difference) < 1e-4


@pytest.mark.parametrize("is_long", [False, True], ids=["BERT", "made long"])
def test_spans_equal_those_of_hugging_faces_model(checkpoint, tokenizer, tmp_path, is_long):  # noqa: F811
    source = checkpoint
    if is_long:
        long = to_long(BertForQuestionAnswering.from_pretrained(checkpoint), max_tokens=None, window=16)
        long.config.sep_token_id = tokenizer.sep_token_id
        long.save_pretrained(source := tmp_path)
        tokenizer.save_pretrained(source)
    reader = Reader(source)
    comparison = reader.compare(QUESTION, TEXTS)
    assert comparison.model == ("LongformerForQuestionAnswering" if is_long else "BertForQuestionAnswering")
    assert comparison.tokens == reader.answer(QUESTION, TEXTS).tokens
    assert comparison.output == "span logits"
    assert comparison.output_difference < 1e-3
    assert comparison.score_difference < 1e-3
    beginning = compare(reader._finder, reader.source, QUESTION, TEXTS, max_tokens=130)
    assert 0 < beginning.tokens <= 130


def test_what_cannot_be_compared_is_refused(checkpoint, evidence_reader, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    folder = saved(ElectraForQuestionAnswering, ElectraConfig, tokenizer, tmp_path)
    with pytest.raises(NotImplementedError, match="runs on transformers itself, so there is nothing to compare"):
        Reader(folder).compare(QUESTION, TEXT)
    with pytest.raises(QuestionError, match="the question is empty"):
        evidence_reader.compare(" ", TEXT)
    packed = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(precision="int8")))
    with pytest.raises(ValueError, match="holds weights packed in int8, which transformers cannot read"):
        compare(packed, "m", QUESTION, TEXTS)
