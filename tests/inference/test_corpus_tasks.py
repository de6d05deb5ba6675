from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.inference.breaking_task import Lengths
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    ElectraConfig,
    ElectraForSequenceClassification,
    pipeline,
)

from longspan import Reader
from longspan.errors import CheckpointError, QuestionError
from longspan.inference.corpus import CorpusDocument
from longspan.inference.corpus_tasks import AnswerEach, Classify, Embed
from longspan.inference.corpus_worker import TaskWorker, one_by_one

SENTENCE = "alice wrote the report near the old river. "
TEXTS = ["the red zoo", SENTENCE * 2, "who lives in town? bob", SENTENCE * 13]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "initializer_range": 0.5,
}


@pytest.fixture(scope="module")
def save(tokenizer, tmp_path_factory):
    """(class, config class, changes) -> the directory of a random checkpoint."""

    def saved(kind, config=BertConfig, **changes):
        torch.manual_seed(0)
        folder = str(tmp_path_factory.mktemp(kind.__name__))
        kind(config(vocab_size=len(tokenizer), **SIZES | {"max_position_embeddings": 64} | changes)).save_pretrained(
            folder
        )
        tokenizer.save_pretrained(folder)
        return folder

    return saved


def documents(*texts):
    return [CorpusDocument(str(number), text, None) for number, text in enumerate(texts)]


def rows(task, *texts):
    return TaskWorker(task).table(documents(*texts)).to_pylist()


@torch.inference_mode()
def test_a_vector_is_the_mean_of_hugging_faces_hidden_states_however_long_the_document(save, tokenizer):
    model = save(BertModel, max_position_embeddings=512)  # the tokenizer's own 64 are no limit
    theirs = AutoModel.from_pretrained(model).eval()
    for row, text in zip(rows(Embed(model=model), *TEXTS), TEXTS, strict=True):
        inputs = tokenizer(text, return_tensors="pt", truncation=False, verbose=False)
        expected = theirs(**inputs).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row["embedding"], expected, rtol=1e-4, atol=1e-5)
        assert row["tokens"] == inputs["input_ids"].shape[1] - 2 and row["error"] is None
    assert row["tokens"] > 64


def test_vectors_of_length_1_point_the_same_way(save):
    model = save(BertModel)
    plain = np.array([row["embedding"] for row in rows(Embed(model=model), *TEXTS)])
    unit = np.array([row["embedding"] for row in rows(Embed(model=model, normalize=True), *TEXTS)])
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-5)


def test_a_precision_and_a_cut_change_the_vectors(save):
    model = save(BertModel)
    plain = rows(Embed(model=model), TEXTS[-1])[0]
    packed = rows(Embed(model=model, precision="bf16"), TEXTS[-1])[0]
    assert 0 < np.abs(np.subtract(packed["embedding"], plain["embedding"])).max() < 0.1
    cut = rows(Embed(model=model, max_tokens=20), TEXTS[-1])[0]
    assert cut["tokens"] == 18 < plain["tokens"]


@pytest.mark.parametrize("kind", ["several classes", "several labels", "one label", "regression", "another family"])
def test_labels_and_scores_are_those_of_hugging_faces_pipeline(save, kind):
    changes = {
        "several classes": {"id2label": {0: "bad", 1: "middling", 2: "good"}},
        "several labels": {"num_labels": 3, "problem_type": "multi_label_classification"},
        "one label": {"num_labels": 1},
        "regression": {"num_labels": 1, "problem_type": "regression"},
        "another family": {"num_labels": 2, "embedding_size": 16},
    }[kind]
    if kind == "another family":
        model = save(ElectraForSequenceClassification, ElectraConfig, **changes)
    else:
        model = save(BertForSequenceClassification, **changes)
    judge = pipeline("text-classification", model=model, device="cpu", top_k=None)
    found = rows(Classify(model=model), *TEXTS[:3])
    for row, expected in zip(found, judge(TEXTS[:3]), strict=True):
        scores = {each["label"]: each["score"] for each in expected}
        assert row["scores"] == pytest.approx(scores, rel=1e-4, abs=1e-5)
        assert row["label"] == expected[0]["label"] and row["score"] == row["scores"][row["label"]]


@torch.inference_mode()
def test_the_logits_of_a_long_document_are_the_mean_of_its_windows_weighted_by_their_tokens(save, tokenizer):
    model = save(BertForSequenceClassification, num_labels=3)
    text = SENTENCE * 11
    ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    assert len(ids) == 99
    windows = [ids[:62], ids[31:93], ids[37:99]]  # of 62 tokens, 31 of them shared, and the last ends with the text
    weights = torch.tensor([1 + 46, 65 - 46, 99 - 65 + 1])  # [CLS] counts in the first, [SEP] in the last
    theirs = AutoModelForSequenceClassification.from_pretrained(model).eval()
    logits = theirs(input_ids=torch.tensor([[2, *window, 3] for window in windows])).logits
    expected = (logits * weights[:, None]).sum(0).div(weights.sum()).softmax(0)
    (row,) = rows(Classify(model=model), text)
    assert list(row["scores"].values()) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert row["tokens"] == 99


def test_answers_are_those_of_a_reader(save):
    model = save(BertForQuestionAnswering)
    question, reader = "who wrote the report?", Reader(model)
    found = rows(AnswerEach(question=question, model=model, top=2), *TEXTS)
    for row, text in zip(found, TEXTS, strict=True):
        expected = replace(reader.answer(question, text, top=2), seconds=0).to_dict()
        assert (row["answer"], row["tokens"]) == (expected["answer"], expected["tokens"])
        assert row["answer_probability"] == pytest.approx(expected["answer_probability"])
        for passage, wanted in zip(row["passages"], expected["passages"], strict=True):
            assert passage.pop("score") == pytest.approx(wanted["score"])
            assert passage == {name: wanted[name] for name in passage}
    with pytest.raises(QuestionError, match="the question is 80 tokens long"):
        rows(AnswerEach(question="who " * 80, model=model), "the zoo")


def test_longspans_own_reader_answers_where_no_model_is_named():
    (row,) = rows(AnswerEach(question="Who wrote the report?", top=1), "Alice wrote the report. Bob likes the zoo.")
    assert row["answer"] is None and "Alice" in row["passages"][0]["text"]


def test_a_bad_document_gets_an_error_and_leaves_the_others_as_they_are(save, tokenizer):
    model = save(BertModel)
    mixed = [*documents(TEXTS[0], "\u200b", TEXTS[2]), CorpusDocument("bad", None, "unreadable")]
    table = TaskWorker(Embed(model=model)).table(mixed).to_pylist()
    assert [row["error"] is None for row in table] == [True, False, True, False]
    assert "no text that this model's tokenizer knows" in table[1]["error"] and table[3]["error"] == "unreadable"
    assert table[1]["embedding"] is None and table[3]["tokens"] is None
    for row, expected in zip(table[::2], rows(Embed(model=model), TEXTS[0], TEXTS[2]), strict=True):
        assert row["embedding"] == pytest.approx(expected["embedding"], rel=1e-5)


def test_a_model_that_gives_nan_is_named_in_the_rows(save, tokenizer, tmp_path):
    model = BertModel.from_pretrained(save(BertModel))
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[5:] = torch.nan
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (row,) = rows(Embed(model=str(tmp_path)), "the zoo")
    assert row["error"].startswith("the model gives NaN or infinite vectors")


def test_what_a_document_raises_is_its_error_and_what_the_processor_lacks_ends_the_run():
    worker = TaskWorker(Lengths())
    table = worker.table(documents("four", "fail", "six"))
    assert table["error"].to_pylist() == [None, "out of memory", None]
    assert table["tokens"].to_pylist() == [4, None, 3]
    with pytest.raises(NotImplementedError, match="no kernel"):
        worker.table(documents("four", "cannot"))


def test_documents_that_end_processes_get_a_row_each():
    task = Lengths()
    worker = TaskWorker(task)
    table = one_by_one(
        task, documents("one", "die", "three"), lambda place, each: None if place == 1 else worker.table([each])
    )
    assert table["tokens"].to_pylist() == [3, None, 5]
    assert table["error"].to_pylist()[1].startswith("reading this document ended its process 2 times")


def test_models_that_are_none_are_refused(save, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        Embed(model=str(tmp_path / "nowhere")).check()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        AnswerEach(question="who?", model=str(tmp_path)).check()
    with pytest.raises(ValueError, match="a question and at least one passage are needed; got ' ', top=3"):
        AnswerEach(question=" ").check()
    with pytest.raises(CheckpointError, match=r"is a BertModel and lacks classifier.bias, .* drawn at random"):
        Classify(model=save(BertModel)).load()
    twice = save(BertForSequenceClassification, id2label={0: "a", 1: "a"})
    with pytest.raises(ValueError, match="has labels of the same name: a, a"):
        Classify(model=twice).check()
    other = save(ElectraForSequenceClassification, ElectraConfig, num_labels=2, embedding_size=16)
    with pytest.raises(NotImplementedError, match="leave precision bf16 out"):
        Classify(model=other, precision="bf16").load()
    with pytest.raises(ValueError, match="max_tokens counts 2 special tokens"):
        Embed(model=save(BertModel), max_tokens=1).load()
