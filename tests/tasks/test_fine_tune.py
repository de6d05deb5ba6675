import json

import pytest
import torch
from tests.tasks.superglue_rows import write_superglue
from tests.training.classification_run import task as colors
from transformers import BertConfig, BertModel

from longspan.models.heads import LongspanForSequenceClassification, LongspanForSpanClassification
from longspan.tasks.fine_tune import fine_tune, named_task
from longspan.tasks.superglue import FORMATS
from longspan.tasks.task import Example, Task

FEW = {"steps": 2, "batch": 2, "learning_rate": 1e-3, "bf16": False}


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def superglue(tmp_path_factory):
    return write_superglue(tmp_path_factory.mktemp("superglue"), without_labels=True)


def test_a_model_learns_and_the_test_split_is_read_with_its_best_weights(base, tmp_path):
    task = colors(120)
    task = Task(name="colors", labels=task.labels, splits={**task.splits, "test": task.splits["dev"]})
    done = fine_tune(base, task, output=tmp_path, epochs=3, batch=8, learning_rate=3e-3, bf16=True)
    assert done.dev["accuracy"] > 0.9
    assert done.test is not None
    assert done.test["accuracy"] == done.dev["accuracy"]
    assert done.max_tokens == 64
    assert LongspanForSequenceClassification.from_pretrained(done.model).config.id2label == {0: "red", 1: "blue"}
    again = fine_tune(base, task, output=tmp_path, epochs=3, batch=8, learning_rate=3e-3, bf16=True)
    assert again == done


@pytest.mark.parametrize("name", FORMATS)
def test_every_superglue_task_trains_and_writes_its_predictions(name, base, superglue, tmp_path):
    done = fine_tune(base, named_task(name, data=superglue), output=tmp_path, max_tokens=60, **FEW)
    assert done.test is None
    assert done.predictions == tmp_path / "predictions" / f"{FORMATS[name].folder}.jsonl"
    assert all("idx" in json.loads(line) for line in done.predictions.read_text().splitlines())
    kind = LongspanForSpanClassification if name in ("wic", "wsc") else LongspanForSequenceClassification
    assert json.loads((done.model / "config.json").read_text())["architectures"] == [kind.__name__]
    assert FORMATS[name].metric in done.dev


def test_long_documents_are_read_to_the_end(base, tmp_path):
    """The word that decides stands far beyond the 64 tokens that the checkpoint reads."""
    rows = tuple(Example(id=str(n), texts=("the zoo " * 60 + ("red", "blue")[n % 2],), label=n % 2) for n in range(8))
    task = Task(name="late", labels=("red", "blue"), splits={"train": rows, "dev": rows})
    done = fine_tune(base, task, output=tmp_path, max_tokens=130, window=16, **FEW)
    assert (done.max_tokens, done.lengthened_from) == (130, 64)
    model = LongspanForSequenceClassification.from_pretrained(done.model)
    assert model.config.embeddings_config.max_tokens == 130
    assert json.loads((done.model / "tokenizer_config.json").read_text())["model_max_length"] == 130


def test_a_task_without_examples_to_train_on_is_refused_before_anything_is_loaded(tmp_path):
    task = Task(name="colors", labels=("red", "blue"), splits={"train": colors().splits["train"]})
    with pytest.raises(ValueError, match="no examples in its 'dev' split; it has some in train"):
        fine_tune(tmp_path / "no-model", task, output=tmp_path / "run")


def test_names_of_tasks(superglue, tmp_path):
    assert named_task("RTE", data=superglue).name == "rte"
    with pytest.raises(ValueError, match=r"no task 'sst2'; there are boolq, .*, wsc, imdb, 20newsgroups"):
        named_task("sst2")
    with pytest.raises(ValueError, match="rte needs the folder where SuperGLUE was unpacked"):
        named_task("rte")
    with pytest.raises(ValueError, match="the texts of imdb lie in a package; leave out"):
        named_task("imdb", data=tmp_path)
