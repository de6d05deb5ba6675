import json
import shutil
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertModel,
    ElectraConfig,
    ElectraForQuestionAnswering,
)

from longspan import Document, LongspanForEvidence, Reader, to_long
from longspan.errors import CheckpointError, DocumentError, NotFiniteError, QuestionError
from longspan.inference.evidence import EvidenceFinder, native_precision
from longspan.inference.extractive import SpanFinder

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
TEXT = (
    "alice wrote the report\nnear the old river.\nbob lives in the red town. " + "the old zoo is near the river. " * 40
)


def saved(model_class, config_class, tokenizer, folder):
    torch.manual_seed(0)
    model_class(config_class(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tokenizer, tmp_path_factory):
    return saved(BertForQuestionAnswering, BertConfig, tokenizer, tmp_path_factory.mktemp("qa"))


@pytest.fixture(scope="session")
def reader(checkpoint):
    return Reader(checkpoint)


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_passages_say_where_they_stand(reader):
    documents = [Document("first.txt", TEXT), Document("second.txt", "who was the zebra")]
    answer = reader.answer("who wrote the report?", documents, passage_words=20)
    texts = {document.name: document.text for document in documents}
    assert 1 <= len(answer.passages) <= 3
    for passage in answer.passages:
        text = texts[passage.document]
        assert passage.text == text[passage.start_char : passage.end_char]
        assert len(passage.text.split()) <= 20
        assert passage.line == len(text[: passage.start_char + 1].splitlines())
    assert answer.answer in answer.passages[0].text
    scores = [passage.score for passage in answer.passages]
    assert scores == sorted(scores, reverse=True)
    assert answer.answer_probability == scores[0]
    ranges = sorted((p.document, p.start_char, p.end_char) for p in answer.passages)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(ranges))


def test_the_dictionary_is_the_documented_json(reader, checkpoint):
    data = json.loads(json.dumps(reader.answer("who?", TEXT).to_dict()))
    assert list(data) == ["question", "answer", "answer_probability", "passages", "tokens", "seconds", "model"]
    assert list(data["passages"][0]) == ["document", "start_char", "end_char", "line", "score", "text"]
    assert data["question"] == "who?"
    assert data["model"] == str(checkpoint)
    assert data["seconds"] > 0


def test_plain_strings_are_documents(reader):
    answer = reader.answer("who wrote the report?", [TEXT, "the red zebra"], top=50, passage_words=5)
    assert {passage.document for passage in answer.passages} == {"document 1", "document 2"}
    assert reader.answer("who?", TEXT).passages[0].document == "document 1"
    assert answer.tokens > reader.answer("who?", TEXT).tokens


def test_top_bounds_the_number_of_passages(reader):
    assert len(reader.answer("who?", TEXT, top=1).passages) == 1
    assert len(reader.answer("who?", TEXT, top=2, passage_words=10).passages) == 2


def test_our_encoder_answers_as_transformers_does(reader, checkpoint, tokenizer):
    assert type(reader._finder.model).__name__ == "LongspanForQuestionAnswering"
    theirs = SpanFinder(BertForQuestionAnswering.from_pretrained(checkpoint).eval(), tokenizer)
    with torch.inference_mode():
        expected = theirs.candidates("who wrote the report?", [TEXT], passage_words=100)
    answer = reader.answer("who wrote the report?", TEXT)
    assert answer.answer == expected.answer
    assert answer.answer_probability == pytest.approx(expected.probability.max(), rel=1e-3)


def test_a_family_that_longspan_does_not_know_runs_on_transformers(tokenizer, tmp_path):
    folder = saved(ElectraForQuestionAnswering, ElectraConfig, tokenizer, tmp_path)
    reader = Reader(folder)
    assert type(reader._finder.model).__name__ == "ElectraForQuestionAnswering"
    assert reader.answer("who wrote the report?", TEXT).answer in TEXT


def test_a_family_that_longspan_does_not_know_has_one_precision(tokenizer, tmp_path):
    folder = saved(ElectraForQuestionAnswering, ElectraConfig, tokenizer, tmp_path)
    with pytest.raises(
        NotImplementedError, match="leaves to transformers, which reads it in fp32; leave precision int8"
    ):
        Reader(folder, precision="int8")


@pytest.fixture(scope="session")
def evidence_checkpoint(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    long = to_long(BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES)), max_tokens=None, window=16)
    folder = tmp_path_factory.mktemp("evidence")
    LongspanForEvidence(long.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def evidence_reader(evidence_checkpoint):
    return Reader(evidence_checkpoint)


def test_the_evidence_reader_gives_passages_of_whole_documents_and_no_answer(evidence_reader):
    calls = []
    texts = [" ".join(f"{word} {number}" for number in range(200)) for word in ("river", "zoo")]
    answer = evidence_reader.answer(
        "who wrote the report?", texts, progress=lambda done, total: calls.append((done, total))
    )
    assert answer.answer is None
    assert answer.answer_probability == answer.passages[0].score
    assert len(answer.passages) == 3
    assert all(len(passage.text.split()) == 100 and 0 <= passage.score <= 1 for passage in answer.passages)
    assert calls[-1] == (answer.tokens, answer.tokens)


def test_copies_of_a_passage_are_found_once(evidence_reader):
    words = [f"{word} {number}" for number, word in enumerate(["river", "zoo", "town", "report"] * 15)]
    original = Document("original", " ".join(words))
    copy = Document("copy", "the " + original.text)
    passages = evidence_reader.answer("who wrote the report?", [original, copy], top=4, passage_words=60).passages
    assert len(passages) > 1
    for better, worse in combinations(passages, 2):
        words = set(worse.text.split())
        assert len(words & set(better.text.split())) <= 0.6 * len(words)


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("bf16", 0.02), ("int8", 0.02)])
def test_every_precision_finds_the_same_evidence(evidence_checkpoint, tokenizer, precision, error):
    trained = EvidenceFinder(LongspanForEvidence.from_pretrained(evidence_checkpoint).eval(), tokenizer)
    expected = trained.candidates("who wrote the report?", [TEXT], passage_words=20).probability
    reader = Reader(evidence_checkpoint, precision=precision)
    found = reader._finder.candidates("who wrote the report?", [TEXT], passage_words=20).probability
    assert np.abs(found - expected).max() < error


@pytest.mark.parametrize(
    ("device", "capabilities", "precision"),
    [
        ("cpu", {"avx512_f": True}, "fp32"),
        ("cpu", {"avx512_bf16": True}, "bf16"),
        ("cpu", {"bf16": True}, "bf16"),
        ("meta", {"avx512_bf16": True}, None),
    ],
)
def test_half_precision_is_the_default_where_the_processor_has_it(monkeypatch, device, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert native_precision(torch.device(device)) == precision


def test_the_engine_reads_by_default(evidence_reader, reader):
    assert evidence_reader._finder.model.base_model.encoder.precision == native_precision(torch.device("cpu"))
    assert reader._finder.model.base_model.encoder.precision == "fp32"


def test_an_unknown_precision_is_refused(checkpoint):
    with pytest.raises(ValueError, match="precision must be 'fp32', 'bf16', 'int8' on cpu; got 'fp8'"):
        Reader(checkpoint, precision="fp8")


def test_weights_with_nan_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    weights["bert.encoder.layer.0.output.dense.weight"][3, 3] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"encoder.blocks.0.ffn_out.weight holds NaN"):
        Reader(copy)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((" ", TEXT), QuestionError, "the question is empty"),
        (("who " * 33, TEXT), QuestionError, "33 tokens long, more than half of the 64"),
        (("who?", []), ValueError, "there are no documents to read"),
        (("who?", [TEXT, " "]), DocumentError, "document 2 is empty"),
    ],
    ids=["empty question", "long question", "no documents", "empty document"],
)
def test_bad_questions_and_documents_are_refused(reader, arguments, error, message):
    with pytest.raises(error, match=message):
        reader.answer(*arguments)


def test_bad_counts_are_refused(reader):
    with pytest.raises(ValueError, match="must be at least 1; got top=0"):
        reader.answer("who?", TEXT, top=0)


def test_a_directory_without_weights_is_refused(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights; it needs a model\.safetensors"):
        Reader(copy)


def test_a_checkpoint_that_is_only_a_pickle_is_refused(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only as a pickle, which can run any code when it is loaded; convert"):
        Reader(copy)


def test_a_directory_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Reader(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        Reader(tmp_path / "nowhere")


def test_damaged_files_are_refused_in_one_line(copy):
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=r"cannot load model .*: .+") as caught:
            Reader(copy)
        assert "\n" not in str(caught.value)
        (copy / name).write_bytes(whole)


@pytest.mark.filterwarnings("ignore")
def test_a_model_without_a_question_answering_head_is_refused(tokenizer, tmp_path):
    folder = saved(BertForMaskedLM, BertConfig, tokenizer, tmp_path)
    with pytest.raises(CheckpointError, match="is a BertForMaskedLM, not a reader: it has no qa_outputs"):
        Reader(folder)


def test_a_model_that_gives_nan_is_refused(copy):
    weights = load_file(copy / "model.safetensors")
    weights["qa_outputs.weight"][:] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match="NaN or infinite logits, so it cannot rank answers"):
        Reader(copy).answer("who?", TEXT)
