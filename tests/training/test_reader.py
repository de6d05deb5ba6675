import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from longspan.inference.windows import candidate_windows
from longspan.models.evidence import LongspanForEvidence
from longspan.training.evidence_rows import interval_iou, load_rows
from longspan.training.reader import (
    ReaderTraining,
    TrainingRows,
    calibrate,
    split_rows,
    train_reader,
    untrained_reader,
)
from longspan.training.reading import LENGTH, STRIDE, document_of
from longspan.training.runs import newest_checkpoint


@pytest.fixture(scope="module")
def config(data, tokenizer, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    return ReaderTraining(
        base=str(base),
        data=str(data),
        output=str(tmp_path_factory.mktemp("output")),
        steps=6,
        batch=2,
        tokens_per_row=192,
        held_out=4,
        monitored=1,
        calibrated=2,
        evaluate_steps=3,
        save_steps=2,
        log_steps=2,
        warmup_steps=1,
        bf16=False,
    )


@pytest.fixture(scope="module")
def finished(config):
    return train_reader(config)


def log_of(output):
    state = json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def test_a_killed_run_goes_on_with_the_same_rows(config, finished, tmp_path):
    """The state of a run killed after step 4, in the middle of writing the next checkpoint."""
    output = finished.parent
    shutil.copytree(output / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copytree(output / "checkpoint-4", tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    again = train_reader(replace(config, output=str(tmp_path)))
    assert log_of(tmp_path) == log_of(output)
    first, second = (LongspanForEvidence.from_pretrained(path).state_dict() for path in (finished, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_run_is_not_trained_again(config, finished):
    before = (finished / "model.safetensors").read_bytes()
    assert (train_reader(config) / "model.safetensors").read_bytes() == before


def test_training_moves_all_but_the_embeddings_and_fits_the_probabilities(config, finished):
    trained, start = LongspanForEvidence.from_pretrained(finished), untrained_reader(config.base)
    moved = {name: not torch.equal(value, start.state_dict()[name]) for name, value in trained.state_dict().items()}
    assert not any(is_moved for name, is_moved in moved.items() if ".embeddings." in name)
    assert moved["longspan.encoder.blocks.0.attention.qkv.weight"]
    assert moved["longspan.encoder.blocks.0.attention.qkv_global.weight"]
    assert moved["window_scorer.out.weight"]
    assert len(trained.config.calibration) == 3
    assert trained.config.training["steps"] == 6
    assert 0 <= trained.config.training["calibration_error"] <= 1
    assert str(config.data) not in (finished / "config.json").read_text()


def test_parts_of_a_score_weigh_as_much_as_finds_most_evidence(data, articles):
    def calibrated(*says):
        """says: for each part of a score, whether it tells where the evidence is."""
        model = SimpleNamespace(config=SimpleNamespace())
        model.weigh = partial(LongspanForEvidence.weigh, model)
        readings = []
        for row in load_rows(data, articles, "boolq_articles", "train"):
            document = document_of(articles, row, "as_is")
            windows = candidate_windows(document.num_words, LENGTH, STRIDE)
            where = 5 * interval_iou(windows, document.evidence).max(1)
            readings.append((row, document, windows, np.stack([where if is_told else -where / 2 for is_told in says])))
        error = calibrate(model, readings)
        assert 0 <= error <= 1 and len(model.config.calibration) == 3
        return model.config.score_weights

    assert calibrated(True, False, False) == [0, 0]
    stretch, words = calibrated(False, True, True)
    assert stretch + words > 0.5
    assert calibrated(False, False, True) == [0, 0.75]


def test_trained_share_mixes_the_weights_before_and_after_training(config, finished, tmp_path):
    shutil.copytree(finished.parent / "checkpoint-6", tmp_path / "checkpoint-6")
    half = train_reader(replace(config, output=str(tmp_path), trained_share=0.5))
    half, whole = (LongspanForEvidence.from_pretrained(path).longspan.state_dict() for path in (half, finished))
    after = LongspanForEvidence.from_pretrained(finished.parent / "checkpoint-6").longspan.state_dict()
    for name, before in untrained_reader(config.base).longspan.state_dict().items():
        torch.testing.assert_close(whole[name], after[name])
        torch.testing.assert_close(half[name], (before + after[name]) / 2)


def test_no_evaluation_or_held_out_article_is_trained_on(config, data, articles):
    rows, held_out, allowed = split_rows(config, articles)
    dev = {row.article for row in load_rows(data, articles, "boolq_articles", "dev")}
    unseen = {row.article for row in held_out}
    seen = {row.article for kept in rows.values() for row in kept}
    assert len(held_out) >= 4
    assert not (dev | unseen) & (seen | {int(article) for article in allowed})
    assert "leak" not in {row.id for row in [*rows["boolq_articles"], *held_out]}
    assert {source: bool(kept) for source, kept in rows.items()} == dict.fromkeys(
        ("boolq_articles", "fever", "multirc", "xquad"), True
    )


def test_rows_are_a_function_of_seed_and_place(config, articles, tokenizer):
    rows, _, allowed = split_rows(config, articles)
    first, again = (TrainingRows(articles, rows, allowed, tokenizer, config) for _ in range(2))
    other = TrainingRows(articles, rows, allowed, tokenizer, replace(config, seed=1))
    for index in (5, 0, 11):
        assert np.array_equal(first[index][0], again[index][0])
        assert np.array_equal(first[index][1].document_ids, again[index][1].document_ids)
        assert first[index][2] == again[index][2]
    assert any(not np.array_equal(first[i][1].document_ids, other[i][1].document_ids) for i in range(4))


def test_every_question_comes_once_before_any_comes_again(config, articles, tokenizer):
    rows, _, allowed = split_rows(config, articles)
    plan = TrainingRows(articles, rows, allowed, tokenizer, replace(config, steps=100))
    drawn = [int(plan.choice[i]) for i in range(len(plan)) if plan.source[i] == "boolq_articles"]
    late = [i for i, row in enumerate(rows["boolq_articles"]) if row.starts_late]
    epoch = sorted([*range(len(rows["boolq_articles"])), *late])
    assert late
    assert sorted(drawn[: len(epoch)]) == epoch


def test_rows_too_short_for_a_question_are_refused(config):
    with pytest.raises(ValueError, match="tokens_per_row must be at least 192; got 100"):
        replace(config, tokens_per_row=100)
    with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
        replace(config, steps=0)
