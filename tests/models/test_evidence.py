import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from longspan import LongspanForEvidence, to_long
from longspan.models import evidence
from longspan.models.evidence import best_within, evidence_loss, lexical_matches, narrow_rows, span_means, widen_rows

QUESTION = torch.tensor([2, 9, 30, 17, 3])


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=99, max_position_embeddings=48, initializer_range=0.2, **sizes)
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def model(bert):
    return reader(bert, window=16)


def reader(bert, window, *, trained=True):
    long = to_long(bert, max_tokens=None, window=window)
    model = LongspanForEvidence(long.config).eval()
    model.longspan.load_state_dict(long.state_dict())
    if trained:
        torch.manual_seed(1)
        for scorer in (model.window_scorer, model.sentence_scorer):
            torch.nn.init.normal_(scorer.out.weight, std=0.1)
    return model


def document(tokens, seed=0):
    return torch.randint(4, 99, (tokens,), generator=torch.Generator().manual_seed(seed))


def spans_of(tokens, length=8, stride=3):
    starts = torch.arange(0, tokens - length + 1, stride)
    return torch.stack((starts, starts + length), 1)


def batch_of(documents, spans):
    rows = [torch.cat((QUESTION, ids)) for ids in documents]
    length = max(map(len, rows))
    return {
        "input_ids": torch.stack([F.pad(row, (0, length - len(row))) for row in rows]),
        "token_mask": torch.stack([torch.arange(length) < len(row) for row in rows]),
        "question_lengths": torch.tensor([len(QUESTION)] * len(rows)),
        "windows": torch.stack([part + len(QUESTION) for part in spans]),
        "window_mask": torch.ones(len(rows), len(spans[0]), dtype=torch.bool),
    }


@torch.no_grad()
def test_before_training_it_is_the_sentence_encoders_cosine_retriever(bert):
    """With a window that covers the row, its scores are 20 times the cosines of BERT's own mean vectors."""
    ids, spans = document(30), spans_of(30)
    row = torch.cat((QUESTION, ids))[None]
    hidden = bert(row).last_hidden_state[0, len(QUESTION) :]
    means = torch.stack([hidden[start:end].mean(0) for start, end in spans])
    asked = bert(QUESTION[None]).last_hidden_state.mean(1)
    scores = reader(bert, window=96, trained=False).score_windows(QUESTION, ids, spans)
    assert torch.allclose(scores, 20 * F.cosine_similarity(means, asked), atol=1e-4)


@torch.no_grad()
def test_a_batch_with_padding_scores_like_single_documents(model):
    documents, spans = [document(40), document(90, seed=1)], [spans_of(40)[:10], spans_of(90)[:10]]
    scores = model(**batch_of(documents, spans)).window_scores
    for number, (ids, part) in enumerate(zip(documents, spans, strict=True)):
        assert torch.allclose(scores[number], model.score_windows(QUESTION, ids, part), atol=1e-4)


def test_a_document_read_in_parts_scores_like_one_pass_but_for_global_rows(bert, monkeypatch):
    """The parts overlap by what the layers reach, so without the question's own reading nothing changes."""
    model = reader(bert, window=16)
    for block in model.longspan.encoder.blocks:  # the question no longer reads the document
        torch.nn.init.zeros_(block.attention.qkv_global.weight)
        torch.nn.init.zeros_(block.attention.qkv_global.bias)
    ids, spans = document(300), spans_of(300)
    whole = model.score_windows(QUESTION, ids, spans)
    monkeypatch.setattr(evidence, "ONE_PASS", 70)
    monkeypatch.setattr(evidence, "SPANS_AT_ONCE", 7)
    assert torch.allclose(model.score_windows(QUESTION, ids, spans), whole, atol=1e-4)


def test_positions_repeat_so_any_length_is_read_and_progress_reaches_the_end(model, monkeypatch):
    monkeypatch.setattr(evidence, "ONE_PASS", 128)
    steps = []
    scores = model.score_windows(
        QUESTION, document(300), spans_of(300), progress=lambda done, total: steps.append((done, total))
    )
    assert scores.shape == (len(spans_of(300)),) and scores.isfinite().all()
    assert steps == sorted(steps) and steps[-1] == (300, 300) and len(steps) == 3 * 2
    assert not any(block._forward_hooks for block in model.longspan.encoder.blocks)
    assert model.score_windows(QUESTION, document(20), torch.empty(0, 2, dtype=torch.long)).shape == (0,)


def test_a_position_offset_moves_the_document_and_not_the_question(model):
    inputs = batch_of([document(40)] * 2, [spans_of(40)] * 2)
    with torch.no_grad():
        moved = model(**inputs, position_offsets=torch.tensor([0, 7])).window_scores
        period = model(**inputs, position_offsets=torch.tensor([0, 48])).window_scores
    assert not torch.allclose(moved[0], moved[1], atol=1e-3)
    assert torch.allclose(period[0], period[1], atol=1e-5)


def test_span_means_are_precise_far_into_a_document():
    torch.manual_seed(0)
    hidden = torch.randn(1, 50_000, 8) + 30
    spans = torch.tensor([[[0, 1], [49_800, 49_930], [49_999, 50_000]]])
    means = span_means(hidden, spans)
    exact = torch.stack([hidden[0, start:end].double().mean(0) for start, end in spans[0]])
    assert torch.allclose(means[0].double(), exact, atol=1e-3)


def test_gradients_of_span_means_are_those_of_plain_means():
    torch.manual_seed(0)
    hidden, weights = torch.randn(2, 20, 4, requires_grad=True), torch.randn(2, 3, 4)
    spans = torch.tensor([[[0, 5], [3, 4], [0, 20]], [[1, 2], [6, 19], [0, 1]]])
    (span_means(hidden, spans) * weights).sum().backward()
    plain = hidden.detach().clone().requires_grad_()
    means = [torch.stack([plain[b, s:e].mean(0) for s, e in spans[b].tolist()]) for b in range(2)]
    (torch.stack(means) * weights).sum().backward()
    assert torch.allclose(hidden.grad, plain.grad, atol=1e-5)


def test_the_loss_is_the_log_of_the_mass_on_evidence():
    scores = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -torch.inf], [1.0, 1.0, 1.0]], requires_grad=True)
    labels = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    shares = scores.softmax(1)
    expected = -((shares[0, 1] + shares[0, 2]).log() + shares[1, 0].log()) / 2  # a row without evidence has no say
    loss = evidence_loss(scores, labels)
    assert torch.allclose(loss, expected)
    loss.backward()
    assert scores.grad.isfinite().all()
    nothing = evidence_loss(scores, torch.zeros_like(labels))
    assert nothing == 0


def test_the_loss_falls_on_a_batch_seen_again(bert):
    model = reader(bert, window=16, trained=False).train()
    inputs = batch_of([document(60, seed) for seed in range(2)], [spans_of(60)] * 2)
    labels = torch.zeros_like(inputs["window_mask"])
    labels[:, 7] = True
    inputs |= {"window_labels": labels, "sentences": inputs["windows"], "sentence_mask": inputs["window_mask"]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**inputs, sentence_labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_autocast_keeps_the_stream_in_bfloat16(model):
    seen = []
    block = model.longspan.encoder.blocks[-1]
    block.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        scores = model.score_windows(QUESTION, document(60), spans_of(60))
    assert set(seen) == {torch.bfloat16} and scores.dtype == torch.float32
    assert torch.allclose(scores, model.score_windows(QUESTION, document(60), spans_of(60)), atol=0.5)


def test_a_saved_reader_gives_the_same_scores(model, tmp_path):
    model.config.calibration = [1.5, 0.25, -1.0]
    model.save_pretrained(tmp_path)
    again = LongspanForEvidence.from_pretrained(tmp_path)
    scores = model.score_windows(QUESTION, document(60), spans_of(60))
    assert torch.equal(again.score_windows(QUESTION, document(60), spans_of(60)), scores)
    assert torch.equal(again.passage_probability(scores), model.passage_probability(scores))


def test_a_compact_reader_is_a_quarter_of_the_size_and_nearly_the_same(model, tmp_path):
    model.config.calibration = [1.5, 0.25, -1.0]
    model.save_compact(tmp_path / "small")
    model.save_pretrained(tmp_path / "large")
    small, large = (tmp_path / name / "model.safetensors" for name in ("small", "large"))
    assert small.stat().st_size < 0.4 * large.stat().st_size
    again, report = LongspanForEvidence.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    scores = model.score_windows(QUESTION, document(60), spans_of(60))
    assert torch.allclose(again.score_windows(QUESTION, document(60), spans_of(60)), scores, atol=0.5)
    assert again.config.calibration == model.config.calibration
    again.save_pretrained(tmp_path / "wide")  # an ordinary checkpoint again
    assert load_file(tmp_path / "wide" / "model.safetensors")["window_scorer.inner.weight"].dtype == torch.float32
    wide = LongspanForEvidence.from_pretrained(tmp_path / "wide")
    assert all(torch.equal(wide.state_dict()[name], value) for name, value in again.state_dict().items())


def test_a_compact_reader_loads_in_the_dtype_asked_for(model, tmp_path):
    model.save_compact(tmp_path)
    narrow = LongspanForEvidence.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}


def test_rows_of_eight_bits_err_by_half_a_step():
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(5, 7) * torch.tensor([[1e-3], [1], [100], [0], [5]]), "a.bias": torch.randn(5)}
    narrow = narrow_rows(weights)
    wide = widen_rows(narrow)
    assert narrow["a.weight"].dtype == torch.int8 and set(wide) == set(weights)
    step = weights["a.weight"].abs().amax(1, keepdim=True) / 127
    assert ((wide["a.weight"] - weights["a.weight"]).abs() <= 0.5001 * step).all()
    assert torch.equal(wide["a.bias"], weights["a.bias"])


def test_probabilities_rise_with_the_score_and_fall_with_rivals(model):
    scores = torch.tensor([1.0, 3.0, 2.0])
    alone = model.passage_probability(scores)
    assert alone.argsort().tolist() == [0, 2, 1]
    assert ((alone > 0) & (alone < 1)).all()
    assert (model.passage_probability(torch.cat((scores, scores)))[:3] < alone).all()


def test_lexical_matches_are_bm25_of_spans_and_their_surroundings():
    ids, spans = document(60) % 20 + 4, spans_of(60)
    expected = [0.0] * len(spans)
    for reach in (0, 8):
        inside = [ids[max(0, start - reach) : end + reach].tolist() for start, end in spans.tolist()]
        for number, span in enumerate(inside):
            for token in set(QUESTION.tolist()):
                holding = sum(token in other for other in inside)
                rarity = math.log(1 + (len(inside) - holding + 0.5) / (holding + 0.5))
                expected[number] += rarity * span.count(token) / (span.count(token) + 1.2)
    assert len(set(expected)) > 2
    assert torch.allclose(lexical_matches(QUESTION, ids, spans), torch.tensor(expected), atol=1e-5)


def test_the_best_stretch_is_that_inside_a_span_or_next_to_a_short_one():
    scores = torch.tensor([3.0, 1.0, 4.0, 1.5, 9.0])  # of tokens 0 to 26, 13 to 39, 26 to 52, 39 to 65, 52 to 78
    spans = torch.tensor([[0, 78], [0, 51], [0, 52], [1, 70], [13, 39], [30, 40], [70, 78]])
    assert best_within(scores, spans).tolist() == [9, 3, 4, 4, 1, 1.5, 9]


@pytest.mark.parametrize("tokens", (1, 30, 300))
def test_stretches_are_scored_as_sentences(model, tokens):
    ids = document(tokens)
    spans = torch.tensor([[0, tokens]])
    starts = range(0, max(1, tokens - 25), 13)
    stretches = torch.tensor([[start, min(tokens, start + 26)] for start in starts])
    vectors, question = model.encode(torch.cat((QUESTION, ids))[None], None, torch.tensor([len(QUESTION)]))
    scores = model.sentence_scorer(span_means(vectors[:, len(QUESTION) :], stretches[None]), question)
    assert torch.allclose(model.score_parts(QUESTION, ids, spans)[1], scores.max(), atol=1e-4)


def test_the_parts_of_a_score_are_weighed_and_a_checkpoint_keeps_the_weights(model, tmp_path):
    ids, spans = document(60) % 20 + 4, spans_of(60)
    parts = model.score_parts(QUESTION, ids, spans)
    assert torch.equal(model.score_windows(QUESTION, ids, spans), parts[0])
    assert torch.equal(parts[2], lexical_matches(QUESTION, ids, spans))
    model.config.score_weights = [0.25, 0.5]
    scores = model.score_windows(QUESTION, ids, spans)
    assert torch.allclose(scores, parts[0] + parts[1] / 4 + parts[2] / 2, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(LongspanForEvidence.from_pretrained(tmp_path).score_windows(QUESTION, ids, spans), scores)
