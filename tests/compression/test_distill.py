import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.compression.small import (
    distill_with_all_there_is_to_resume,
    pad,
    tiny_classifier,
    tiny_features,
    tiny_ours,
)
from tests.models.tiny import tiny_model
from transformers import AutoModelForQuestionAnswering, BertConfig

from longspan.compression.distill import Distillation, Rows, distill
from longspan.compression.distillation_loss import DistillationLoss
from longspan.compression.students import student_of
from longspan.compression.teacher_outputs import compute_teacher_outputs, without_labels
from longspan.models import LongspanForSequenceClassification

ROWS = Rows(tiny_features(24), pad)
QUICK = Distillation(epochs=2, batch=4, learning_rate=1e-3, bf16=False)


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def are_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def agreement(teacher, features, model):
    batch = pad([without_labels(row) for row in features])
    return {"agreement": float((teacher(**batch).logits.argmax(1) == model(**batch).logits.argmax(1)).float().mean())}


def test_a_student_learns_from_cached_logits(tmp_path):
    teacher = tiny_classifier()
    student = student_of(teacher, 1)
    before = agreement(teacher, ROWS.features, student)["agreement"]
    settings = replace(QUICK, epochs=12, learning_rate=3e-3)
    trained = distill(teacher, student, ROWS, tmp_path, settings, evaluate=partial(agreement, teacher, ROWS.features))
    assert agreement(teacher, ROWS.features, trained)["agreement"] > max(before, 0.8)
    loaded = LongspanForSequenceClassification.from_pretrained(tmp_path / "model")
    assert are_equal(weights_of(loaded), weights_of(trained))
    again = distill(teacher, student_of(teacher, 1), ROWS, tmp_path, settings)
    assert are_equal(weights_of(again), weights_of(trained))


def test_the_best_checkpoint_is_kept(tmp_path):
    seen = []

    def falling(model):
        seen.append(weights_of(model))
        return {"other": 0.0, "quality": -float(len(seen))}

    teacher = tiny_classifier()
    settings = replace(QUICK, epochs=3, metric="quality")
    trained = distill(teacher, student_of(teacher, 1), ROWS, tmp_path, settings, evaluate=falling)
    assert len(seen) == 3
    assert are_equal(weights_of(trained), seen[0])
    with pytest.raises(ValueError, match="metric 'accuracy' is not measured; there is other, quality"):
        distill(
            teacher,
            student_of(teacher, 1),
            ROWS,
            tmp_path / "new",
            replace(settings, metric="accuracy"),
            evaluate=falling,
        )


ALL_TERMS = DistillationLoss(hard_labels=0.5, hidden_states=1, embeddings=1, relations=1, relation_heads=2)


@pytest.mark.parametrize("family", ["bert", "longformer", "modernbert"])
def test_kept_states_do_what_the_live_teacher_does(family, tmp_path):
    """A student of another width, all terms at once, and a teacher of every layout."""
    rows = Rows(tiny_features(8), partial(pad, padding=1 if family == "longformer" else 0))
    teacher = tiny_classifier(family)
    trained = []
    for keep in ("logits", "all"):
        student = tiny_ours("bert", hidden_size=16, num_hidden_layers=2, seed=1)
        settings = Distillation(epochs=1, batch=4, learning_rate=1e-3, bf16=False, loss=ALL_TERMS, keep=keep)
        trained.append(weights_of(distill(teacher, student, rows, tmp_path / keep, settings)))
        assert not any("projections" in name for name in trained[-1])
        state = json.loads((tmp_path / keep / "checkpoint-2" / "trainer_state.json").read_text())
        assert state["global_step"] == 2
    for name, weight in trained[0].items():  # states are kept in bf16
        torch.testing.assert_close(trained[1][name], weight, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("keep", ["logits", "all"])
def test_question_answering_models_are_distilled(keep, tmp_path):
    config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(0)
    teacher = AutoModelForQuestionAnswering.from_config(config)
    student = student_of(teacher, 1)
    before = weights_of(student)
    rows = Rows([without_labels(row) for row in ROWS.features], pad)
    loss = DistillationLoss(hidden_states=1)
    trained = distill(teacher, student, rows, tmp_path, replace(QUICK, epochs=1, loss=loss, keep=keep))
    assert not are_equal(weights_of(trained), before)
    with pytest.raises(ValueError, match="different tokens"):
        distill(teacher, student, rows._replace(teacher_features=list(rows.features)), tmp_path / "other", QUICK)


@pytest.mark.parametrize("keep", ["logits", "all"])
def test_base_models_are_distilled_by_relations_alone(keep, tmp_path):
    teacher = tiny_model("bert")
    student = student_of(teacher, 2)
    before = weights_of(student)
    loss = DistillationLoss(logits=0, relations=1, relation_heads=2, layer_map="last")
    rows = Rows([without_labels(row) for row in ROWS.features], pad)
    trained = distill(teacher, student, rows, tmp_path / "run", replace(QUICK, epochs=1, loss=loss, keep=keep))
    assert not are_equal(weights_of(trained), before)
    with pytest.raises(NotImplementedError, match="teacher gives none and the student none: set logits to 0"):
        distill(teacher, student, rows, tmp_path / "no", replace(QUICK, loss=replace(loss, logits=1), keep=keep))


def test_students_of_other_tokenizers_learn_from_logits(tmp_path):
    teacher, student = tiny_classifier(vocab_size=50), tiny_ours(seed=1, num_hidden_layers=1)
    theirs = [
        {
            "input_ids": [5 + i % 40 for i in row["input_ids"]] + [6, 6],
            "attention_mask": [1] * (len(row["input_ids"]) + 2),
        }
        for row in ROWS.features
    ]
    with pytest.raises(ValueError, match=r"different tokenizers \(50 and 99 tokens\): pass teacher_features"):
        distill(teacher, student, ROWS, tmp_path, QUICK)
    rows = Rows(ROWS.features, pad, theirs, pad)
    with pytest.raises(ValueError, match="set hidden_states, embeddings and relations to 0"):
        distill(teacher, student, rows, tmp_path, replace(QUICK, loss=DistillationLoss(embeddings=1)))
    distill(teacher, student, rows, tmp_path, replace(QUICK, epochs=1))
    with pytest.raises(ValueError, match="same examples: 3 rows for the teacher, 24 for the student"):
        distill(teacher, student, rows._replace(teacher_features=theirs[:3]), tmp_path, QUICK)


def test_models_and_rows_that_do_not_fit_are_refused(tmp_path):
    teacher = tiny_classifier()
    refused = partial(distill, output=tmp_path / "none", settings=QUICK)
    with pytest.raises(ValueError, match="teacher tells 3 labels apart and the student 2"):
        refused(teacher, tiny_ours(num_labels=2), ROWS)
    with pytest.raises(ValueError, match="number their labels differently"):
        student = tiny_ours()
        student.config.id2label = dict(enumerate(reversed(list(teacher.config.id2label.values()))))
        refused(teacher, student, ROWS)
    with pytest.raises(ValueError, match="no rows"):
        refused(teacher, tiny_ours(), Rows([], pad))
    unlabeled = Rows([without_labels(row) for row in ROWS.features], pad)
    with pytest.raises(ValueError, match="features hold none"):
        refused(teacher, tiny_ours(), unlabeled, settings=replace(QUICK, loss=DistillationLoss(hard_labels=1)))
    with pytest.raises(ValueError, match="hold label 7; the student has 3 labels"):
        wrong = Rows([row | {"labels": 7} for row in ROWS.features], pad)
        refused(teacher, tiny_ours(), wrong, settings=replace(QUICK, loss=DistillationLoss(hard_labels=1)))
    assert not (tmp_path / "none").exists()


def test_a_folder_of_another_run_is_refused(tmp_path):
    teacher = tiny_classifier()
    distill(teacher, student_of(teacher, 1), ROWS, tmp_path, replace(QUICK, epochs=1))
    with pytest.raises(ValueError, match="holds a run with other arguments: epochs was 1 and is 2; rows was"):
        distill(teacher, student_of(teacher, 1), Rows(ROWS.features[:8], pad), tmp_path, QUICK)


def test_students_are_layers_of_their_teacher():
    teacher = tiny_ours("modernbert")
    student = student_of(teacher, 2)
    assert student.config.encoder_config.blocks == tuple(teacher.config.encoder_config.blocks[i] for i in (1, 3))
    for name, weight in student.longspan.encoder.blocks[0].state_dict().items():
        assert torch.equal(weight, teacher.longspan.encoder.blocks[1].state_dict()[name])
    same = student_of(tiny_classifier(), [1, 2, 3])
    assert are_equal(weights_of(same), weights_of(tiny_ours()))
    with pytest.raises(ValueError, match="1 to 4 student layers"):
        student_of(teacher, 5)
    with pytest.raises(ValueError, match="numbers from 1 to 4"):
        student_of(teacher, [0, 1])


def test_teacher_outputs_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr("longspan.compression.teacher_outputs._ROWS_A_SHARD", 5)
    teacher = tiny_classifier()
    calls = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    compute = partial(compute_teacher_outputs, features=ROWS.features, collate=pad, wanted=["hidden.1"], batch=5)
    kept = compute(teacher, folder=tmp_path)
    assert len(calls) == 5
    kept.path(2).unlink()  # as if killed before it was written
    compute(teacher, folder=tmp_path)
    assert len(calls) == 6
    compute(teacher, folder=tmp_path, features=[row | {"labels": 0} for row in ROWS.features])
    assert len(calls) == 6
    numbers = [3, 20, 7]
    batch = pad([ROWS.features[number] for number in numbers])
    mask = batch["attention_mask"].bool()
    found = kept.batch(numbers, mask)
    with torch.no_grad():
        output = teacher(**batch, output_hidden_states=True)
    torch.testing.assert_close(found["logits"], output.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["hidden.1"][mask], output.hidden_states[1][mask], rtol=1e-2, atol=1e-2)
    assert not found["hidden.1"][~mask].any()
    with torch.no_grad():
        teacher.classifier.bias.add_(1)
    calls.clear()
    compute(teacher, folder=tmp_path)
    assert len(calls) == 5


def test_a_full_disk_leaves_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr("longspan.compression.teacher_outputs._ROWS_A_SHARD", 10)
    written = []

    def save(tensors, path):
        if len(written) == 2:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path)

    monkeypatch.setattr("longspan.compression.teacher_outputs.save_file", save)
    with pytest.raises(OSError, match="No space left"):
        compute_teacher_outputs(tiny_classifier(), ROWS.features, tmp_path, collate=pad)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["rows-00000.safetensors", "rows-00001.safetensors"]
    assert all(load_file(path)["logits"].shape == (10, 3) for path in folder.iterdir())


def test_a_teacher_on_a_cpu_reads_few_tokens_at_a_time(tmp_path, monkeypatch):
    teacher, shapes = tiny_classifier(), []
    expected = compute_teacher_outputs(teacher, ROWS.features, tmp_path / "at once", collate=pad)
    monkeypatch.setattr("longspan.compression.teacher_outputs._TOKENS_ON_CPU", 40)

    def collate(features):
        batch = pad(features)
        shapes.append(batch["input_ids"].shape)
        return batch

    found = compute_teacher_outputs(teacher, ROWS.features, tmp_path / "few", collate=collate)
    assert sum(rows for rows, _ in shapes) == len(ROWS.features)
    assert all(rows * tokens <= 40 for rows, tokens in shapes) and max(rows for rows, _ in shapes) > 1
    number = range(len(ROWS.features))
    mask = pad(ROWS.features)["attention_mask"].bool()
    logits = (outputs.batch(number, mask)["logits"] for outputs in (found, expected))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_teacher_outputs_that_are_not_finite_are_refused(tmp_path):
    teacher = tiny_classifier()
    with torch.no_grad():
        teacher.classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        compute_teacher_outputs(teacher, ROWS.features, tmp_path, collate=pad)
    with pytest.raises(ValueError, match="no rows for the teacher"):
        compute_teacher_outputs(teacher, [], tmp_path, collate=pad)


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    script = (
        "import sys, torch; torch.use_deterministic_algorithms(True)\n"
        "from tests.compression.small import distill_with_all_there_is_to_resume\n"
        "distill_with_all_there_is_to_resume(sys.argv[1], 1.0)"
    )
    running = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "killed")],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while not list((tmp_path / "killed").glob("checkpoint-4/trainer_state.json")):
        assert running.poll() is None and time.time() < deadline
        time.sleep(0.02)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()
    for name in ("killed", "whole"):
        distill_with_all_there_is_to_resume(tmp_path / name)
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "whole"))
    assert are_equal(one, other)
