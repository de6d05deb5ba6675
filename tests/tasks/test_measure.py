import time

import numpy as np
import pytest
import torch
from tests.models.tiny import tiny_config, tiny_model
from transformers import MPNetConfig

from longspan.inference.engines import Engine
from longspan.tasks.measure import evaluate_task, make_batches, measure, reads, task_of_file
from longspan.tasks.task import Example, Task

FEATURES = [
    {"input_ids": list(range(5, 5 + length)), "attention_mask": [1] * length, "labels": length % 2}
    for length in (3, 9, 4, 7, 1)
]


def engine_of(logits, instances=1):
    return Engine(name="longspan", precision="fp32", instances=instances, threads_per_instance=1, logits=logits)


def sums(batch):
    """Logits that tell the row they are of, whatever padding surrounds it."""
    seen = batch["input_ids"] * batch["attention_mask"]
    return np.stack((seen.sum(1), batch["attention_mask"].sum(1)), 1).astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"batch": 2}, {"batch": 3, "fixed_length": 12}, {"batch": 100}])
@pytest.mark.parametrize("instances", [1, 3])
def test_logits_come_in_the_order_of_the_rows_however_they_are_batched(options, instances):
    logits, measured = measure(engine_of(sums, instances), FEATURES, **options)
    assert logits.tolist() == [[sum(row["input_ids"]), len(row["input_ids"])] for row in FEATURES]
    assert measured.documents == 5 and measured.tokens == 24
    assert measured.batch == options.get("batch", 1) and measured.fixed_length == options.get("fixed_length")
    assert measured.cost_per_million is None


def test_rows_are_padded_to_their_batchs_longest_or_to_the_fixed_length():
    batches, places = make_batches(FEATURES, batch=2, fixed_length=None, pad_token_id=99)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 9), (2, 4), (1, 1)]
    assert np.concatenate(places).tolist() == [1, 3, 2, 0, 4]
    assert batches[1]["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 7, 99]]
    assert batches[1]["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert set(batches[0]) == {"input_ids", "attention_mask"}
    batches, places = make_batches(FEATURES, batch=1, fixed_length=12, pad_token_id=0)
    assert {batch["input_ids"].shape for batch in batches} == {(1, 12)}
    assert np.concatenate(places).tolist() == [0, 1, 2, 3, 4]
    spans = [row | {"span_ranges": [[0, 1], [0, 1]]} for row in FEATURES]
    assert make_batches(spans, batch=5, fixed_length=None, pad_token_id=0)[0][0]["span_ranges"].shape == (5, 2, 2)


def test_latency_throughput_and_cost_belong_together():
    def slow(batch):
        time.sleep(0.02 if batch["attention_mask"].sum() < 9 else 0.06)
        return sums(batch)

    _, measured = measure(engine_of(slow), FEATURES, price_per_hour=3.6)
    assert 20 <= measured.latency_ms_p50 < 40 and 50 <= measured.latency_ms_p95 < 90
    assert measured.seconds >= 0.14
    assert measured.documents_per_second == pytest.approx(5 / measured.seconds)
    assert measured.tokens_per_second == pytest.approx(24 / measured.seconds)
    assert measured.cost_per_million == pytest.approx(0.001 * measured.seconds / 5 * 1e6)
    _, together = measure(engine_of(slow, instances=5), FEATURES)
    assert together.seconds < measured.seconds


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ([], {}, "no rows"),
        (FEATURES, {"fixed_length": 8}, "row 1 has 9 tokens, more than the fixed length of 8"),
        (FEATURES, {"batch": 0}, "at least 1; got 0"),
        (FEATURES, {"price_per_hour": 0}, "above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(features, options, message):
    with pytest.raises(ValueError, match=message):
        measure(engine_of(sums), features, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """Three labels, one more than the task knows, and in another order."""
    folder = tmp_path_factory.mktemp("checkpoint")
    names = {"id2label": {0: "so so", 1: "good", 2: "bad"}, "label2id": {"so so": 0, "good": 1, "bad": 2}}
    model = tiny_model("bert", "sequence_classification", vocab_size=len(tokenizer), num_hidden_layers=1, **names)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        model.classifier.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))  # it likes best what the task does not ask for
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEXTS = ["alice lives in the zoo", "bob", "the old river", "a zebra wrote a report near town " * 12]


def task_with(labels=("bad", "good")):
    dev = tuple(Example(id=str(n), texts=(text,), label=n % 2) for n, text in enumerate(TEXTS))
    return Task(name="tiny", labels=labels, splits={"dev": dev})


def test_a_task_is_evaluated_on_each_engine_with_the_models_labels_in_the_tasks_order(checkpoint):
    pytest.importorskip("onnxruntime", reason="needs pip install longspan[onnx]")
    task = task_with()
    rows = evaluate_task(
        checkpoint, task, engines=["huggingface", "longspan", "onnx:int8"], batch=2, price_per_hour=1.0
    )
    assert [(row.engine, row.precision) for row in rows] == [
        ("huggingface", "fp32"),
        ("longspan", "fp32"),
        ("onnx", "int8"),
    ]
    for row in rows:
        assert set(row.metrics) == {"accuracy", "macro_f1"} and row.cost_per_million > 0
        assert row.tokens == 7 + 3 + 5 + 64  # the last one is cut to what the model reads
    assert rows[0].metrics == rows[1].metrics
    with pytest.raises(ValueError, match="no label 'awful'"):
        evaluate_task(checkpoint, task_with(("awful", "good")))
    (cut,) = evaluate_task(checkpoint, task, fixed_length=6)
    assert cut.tokens == 6 + 3 + 5 + 6 and cut.fixed_length == 6
    (few,) = evaluate_task(checkpoint, task, limit=2)
    assert few.documents == 2


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (tiny_config("roberta"), 64),  # the table has two rows more, for padding
        (tiny_config("modernbert", max_position_embeddings=100), 100),
        (MPNetConfig(max_position_embeddings=514), 64),  # not one of ours: what the tokenizer says
    ],
)
def test_rows_are_cut_to_what_the_model_reads(tokenizer, config, limit):
    assert reads(config, tokenizer) == limit


def test_the_rows_of_a_file_are_judged_among_all_labels_of_the_model(checkpoint, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"{text},{'bad' if n % 2 else 'good'}\n" for n, text in enumerate(TEXTS)))
    task = task_of_file(file, checkpoint)
    assert task.labels == ("so so", "good", "bad")
    assert [example.label for example in task.examples("dev")] == [1, 2, 1, 2]
    (row,) = evaluate_task(checkpoint, task)
    assert row.metrics["accuracy"] == 0.0  # all are "so so", which the file does not hold
    file.write_text("text,label\nalice,awful\nbob,good\n")
    with pytest.raises(ValueError, match="no label 'awful'"):
        task_of_file(file, checkpoint)
