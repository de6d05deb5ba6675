import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from longspan.tasks import evidence_systems
from longspan.tasks.evidence import evaluate_reader, token_f1
from longspan.tasks.evidence_systems import (
    BM25Chunks,
    CosineChunks,
    EvidenceReader,
    best_fixed_windows,
    first_hundreds,
    hundreds,
)
from longspan.training.evidence_rows import load_rows
from longspan.training.reader import untrained_reader
from longspan.training.reading import document_of, hits


@pytest.fixture(scope="session")
def minilm(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(minilm, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    untrained_reader(str(minilm)).save_compact(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def table(data, trained, minilm, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return evaluate_reader(data, condition="as_is", model=trained, minilm=minilm, cache=cache)


def test_the_table_is_the_documented_json(table):
    table = json.loads(json.dumps(table))
    assert list(table) == ["condition", "questions", "rows"]
    assert (table["condition"], table["questions"]) == ("as_is", 3)
    columns = ["system", "top1", "top3", "late_top1", "late_top3", "token_f1", "tokens_per_second"]
    assert all(list(row) == columns for row in table["rows"])
    names = [row["system"] for row in table["rows"]]
    assert names[0] == "longspan reader"
    assert len(names) == 6
    assert "first 512 tokens" in names[1] and "cosine" in names[2] and "BM25" in names[3] and "first 100" in names[4]
    assert table["rows"][0]["tokens_per_second"] > 0
    assert table["rows"][4]["tokens_per_second"] is None
    assert all(0 <= row["top1"] <= row["top3"] <= 1 and 0 <= row["token_f1"] <= 1 for row in table["rows"])


def test_a_limit_takes_the_same_sample_every_time(data, trained, articles, tmp_path, tokenizer):
    options = {"model": trained, "limit": 2, "systems": ["first"], "cache": tmp_path}
    first, again = (evaluate_reader(data, **options) for _ in range(2))
    assert first == again
    assert first["questions"] == 2


def test_what_cannot_be_had_leaves_its_row_empty_and_says_why(data, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    options = {"model": trained, "limit": 1, "systems": ["first", "cosine", "bm25"], "cache": tmp_path / "cache"}
    cosine, bm25, first = evaluate_reader(data, **options, minilm=tmp_path / "nowhere")["rows"]
    assert "cosine (left out: " in cosine["system"] and "nowhere" in cosine["system"]
    assert "bm25 (left out: " in bm25["system"] and "pip install longspan[evaluate]" in bm25["system"]
    for left_out in (cosine, bm25):
        assert left_out["top1"] is None and left_out["tokens_per_second"] is None
    assert first["top1"] is not None


def test_unknown_conditions_and_systems_are_refused(data):
    with pytest.raises(ValueError, match="condition must be 'as_is' or 'buried'; got 'lost'"):
        evaluate_reader(data, condition="lost")
    with pytest.raises(ValueError, match=r"unknown systems \['oracle'\]"):
        evaluate_reader(data, systems=["oracle"])


def test_unknown_precisions_are_refused(data, trained, tmp_path):
    with pytest.raises(ValueError, match="precision must be 'fp32', 'bf16', 'int8' on cpu; got 'fp8'"):
        evaluate_reader(data, model=trained, precision="fp8", systems=["first"], cache=tmp_path)


def test_token_f1_counts_words_of_all_evidence_once():
    evidence = np.array([[10, 20], [15, 30]])  # 20 words
    assert token_f1(np.array([20, 40]), evidence) == 2 * 10 / (20 + 20)
    assert token_f1(np.array([10, 30]), evidence) == 1
    assert token_f1(np.array([30, 40]), evidence) == 0


def test_bm25_finds_the_chunk_with_the_rare_word(data, articles):
    for row in load_rows(data, articles, "boolq_articles", "dev"):
        document = document_of(articles, row, "as_is")
        best = BM25Chunks(articles).passages(row, document)[0]
        assert (interval := row.evidence[0])[0] < best[1] and interval[1] > best[0]


def test_cosine_vectors_are_the_normalized_means_of_the_model(tokenizer, minilm):
    system = CosineChunks(tokenizer, str(minilm), batch=2)
    texts = ["the zebra lives in the zoo .", "bob", "alice wrote a report near the old river ."]
    vectors = system.embed([np.array(tokenizer(text)["input_ids"]) for text in texts])
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            mean = system.model(**system.tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0]
        assert torch.allclose(torch.from_numpy(vector), mean / mean.norm(), atol=0.02)  # bfloat16
        assert math.isclose(np.linalg.norm(vector), 1, rel_tol=1e-4)


def test_the_reader_cut_at_512_tokens_never_looks_beyond(data, articles, trained, tokenizer):
    row = load_rows(data, articles, "boolq_articles", "dev")[0]
    document = document_of(articles, row, "as_is")
    model = evidence_systems.EvidenceReader  # the class says what it cuts
    reader = untrained = model(_model(trained), tokenizer, max_tokens=512)
    assert untrained.name.endswith("first 512 tokens")
    passages = reader.passages(row, document)
    assert document.first_token[passages.max()] <= 512 < len(document.token_ids)


def test_passages_of_the_reader_are_disjoint_hundreds(data, articles, trained, tokenizer):
    row = load_rows(data, articles, "boolq_articles", "dev")[0]
    passages = EvidenceReader(_model(trained), tokenizer).passages(row, document_of(articles, row, "as_is"))
    assert passages.shape == (3, 2)
    assert (passages[:, 1] - passages[:, 0] <= 100).all()
    ordered = passages[np.argsort(passages[:, 0])]
    assert (ordered[1:, 0] >= ordered[:-1, 1]).all()


def test_fixed_windows_are_tuned_on_the_rows_given(data, articles):
    rows = [row for row in load_rows(data, articles, "boolq_articles", "train") if row.id != "leak"]
    best = best_fixed_windows(rows)
    assert (best.windows[:, 1] - best.windows[:, 0] == 100).all()

    def top1(system):
        return sum(hits(system.passages(row, document_of(articles, row, "as_is")), row.evidence)[0] for row in rows)

    assert top1(best) > top1(first_hundreds())


def test_hundreds_cover_every_word_once():
    assert hundreds(250).tolist() == [[0, 100], [100, 200], [200, 250]]
    assert hundreds(100).tolist() == [[0, 100]]


def _model(folder):
    from longspan import LongspanForEvidence

    return LongspanForEvidence.from_pretrained(folder)


def test_a_sentence_encoder_with_other_tokens_is_refused(tokenizer, minilm):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["zebras"])
    with pytest.raises(ValueError, match="other tokens than the reader"):
        CosineChunks(other, str(minilm))
