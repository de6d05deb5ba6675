import json
from dataclasses import replace

import pytest
import torch
from tests.training.classification_run import task as colors
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel

from longspan.recipes import reviews as recipe
from longspan.recipes.reviews import Reviews, Student, reviews
from longspan.tasks.task import Task

pytest.importorskip("onnxruntime")

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32, "max_position_embeddings": 66}


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture
def config(tokenizer, tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **SIZES}
    MPNetModel(MPNetConfig(num_hidden_layers=2, **sizes)).save_pretrained(tmp_path / "large")
    BertModel(BertConfig(num_hidden_layers=2, **sizes)).save_pretrained(tmp_path / "small")
    for name in ("large", "small"):
        tokenizer.save_pretrained(tmp_path / name)
    splits = colors(80).splits
    task = Task(name="colors", labels=("red", "blue"), splits={**splits, "test": splits["dev"]})
    monkeypatch.setattr(recipe, "imdb", lambda seed: task)
    return Reviews.quick(
        str(tmp_path / "run"),
        teacher=str(tmp_path / "large"),
        student=str(tmp_path / "small"),
        teacher_tokens=32,
        max_tokens=32,
        train_rows=48,
        students=(
            Student(name="2 layers", layers=2),
            Student(name="2 layers, cut", layers=2, pruned=(2, 16)),
            Student(name="2 layers, cut, n-grams", layers=2, pruned=(2, 16), ngrams=True),
            Student(name="1 layer", layers=1),
        ),
        instances=1,
    )


def test_a_recipe_makes_every_row_and_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    done = []
    rows = reviews(config, tell=done.append)
    assert [(row.name, row.engine) for row in rows] == [
        ("teacher, padded to the longest", "huggingface fp32"),
        ("teacher, own length", "huggingface fp32"),
        ("2 layers", "longspan fp32"),
        ("2 layers", "longspan int8"),
        ("2 layers, 1 instances", "longspan int8"),
        ("2 layers, 1 instances", "onnx int8"),
        ("2 layers, cut, 1 instances", "longspan int8"),
        ("2 layers, cut, 1 instances", "onnx int8"),
        ("2 layers, cut, n-grams, 1 instances", "longspan int8"),
        ("2 layers, cut, n-grams, 1 instances", "onnx int8"),
        ("1 layer, 1 instances", "longspan int8"),
        ("1 layer, 1 instances", "onnx int8"),
    ]
    assert rows[0].speedup == rows[0].of_teacher == 1
    for row in rows:
        assert row.speedup == pytest.approx(rows[0].ms_per_review / row.ms_per_review)
        assert row.of_teacher == pytest.approx(row.accuracy / rows[0].accuracy)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["ms_per_review"] for row in report["rows"]] == [row.ms_per_review for row in rows]
    assert report["ngrams_accuracy"] > 0.9  # one word tells the label
    cut = json.loads((tmp_path / "run" / "2-layers-cut" / "model" / "config.json").read_text())
    assert [(block["heads"], block["ffn_width"]) for block in cut["encoder"]["blocks"]] == [(2, 16), (4, 32)]

    def never(*_, **__):
        raise AssertionError("a finished step was done again")

    monkeypatch.setattr(recipe, "distill", never)
    monkeypatch.setattr(recipe, "fit_ngrams", never)
    again = reviews(config)
    assert [(row.name, row.accuracy) for row in again] == [(row.name, row.accuracy) for row in rows]


def test_a_student_is_made_of_one_that_is_there(config):
    for student, what in (
        (Student(name="cut", layers=3, pruned=(2, 16)), "of 3 whole layers"),
        (Student(name="cut", layers=1), "of 3 whole layers"),
        (Student(name="cut", layers=3, ngrams=True), "of its shape without n-grams"),
    ):
        with pytest.raises(ValueError, match=f"'cut' is made of a student {what}, and there is none"):
            replace(config, students=(student, Student(name="other", layers=3, pruned=(1, 16))))
