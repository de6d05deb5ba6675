import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.inference.fragile import Fragile
from tests.inference.test_reader import TEXT, evidence_checkpoint  # noqa: F401
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification, BertModel

from longspan import Reader
from longspan.errors import NotFiniteError, QuestionError
from longspan.inference import WorkerCrashed, WorkerPool, workers
from longspan.inference.worker_process import call_rows

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_labels": 3,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Fragile(BertConfig(**SIZES)).eval()


@pytest.fixture(scope="module")
def cores():
    """For two workers wherever the tests run: twice the same, where there is only one."""
    return (workers.allowed_cores() * 2)[:2]


@pytest.fixture(scope="module")
def pool(model, cores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "allowed_cores", lambda: cores)
        with WorkerPool(model) as pool:
            yield pool


def ids(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 50, (length,), generator=generator) for length in lengths]


def _first(value):
    return tuple(_first(part) for part in value) if isinstance(value, tuple) else value[0]


def is_alive(process):
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_results_come_in_the_order_of_the_requests_and_equal_the_models(pool, model):
    requests = [{"input_ids": row[None]} for row in ids(60, 3, 17, 9, 31, 4)]
    requests[2]["input_ids"] = requests[2]["input_ids"].numpy()
    outputs = list(pool.map(requests))
    with torch.inference_mode():
        for request, output in zip(requests, outputs, strict=True):
            expected = model(torch.as_tensor(request["input_ids"]))
            assert type(output) is type(expected)
            torch.testing.assert_close(output.logits, expected.logits)


def test_rows_are_batched_by_length_and_come_back_without_padding(pool, model):
    rows = ids(5, 50, 3, 60, 60, 1, 32, 7)
    outputs = pool.map_rows((row.tolist() for row in rows), max_tokens=120, max_padding=0.5, ahead=5)
    with torch.inference_mode():
        for row, output in zip(rows, outputs, strict=True):
            torch.testing.assert_close(output.logits, model(row[None]).logits[0])


@pytest.mark.parametrize("kind", [BertForQuestionAnswering, BertForTokenClassification, BertModel])
def test_a_rows_output_is_that_of_the_row_alone(kind):
    # As many labels as the longest row has tokens and as the states are wide: shapes alone tell nothing.
    model = kind(BertConfig(**SIZES | {"num_labels": 2 if kind is BertForQuestionAnswering else 32})).eval()
    model.config.output_hidden_states = True
    rows = [{"input_ids": row.numpy(), "token_type_ids": row.numpy() % 2} for row in ids(32, 5, 31)]
    with torch.inference_mode():
        for row, output in zip(rows, call_rows(model, rows), strict=True):
            expected = model(**{name: torch.from_numpy(value)[None] for name, value in row.items()})
            assert output.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(output[name], _first(expected[name]), rtol=1e-4, atol=1e-5)


def test_workers_stay_on_their_cores_and_share_the_mapped_weights(pool, cores):
    places = {place[0]: place for place in pool.map([{}] * 20, method="where")}
    assert len(places) == pool.instances == 2
    assert sorted(place[1] for place in places.values()) == [[core] for core in cores]
    for _, _, threads, weights in places.values():
        assert threads == 1
        assert weights and all("\nAnonymous:             0 kB" in part for part in weights)  # no page is a copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_tensors_travel_as_they_are(pool, dtype, shape):
    value = (torch.rand(shape) * 2).to(dtype)
    (back,) = pool.map([{"value": [value]}], method="echo")
    assert back[0].dtype == dtype and torch.equal(back[0], value)


def test_a_view_travels_without_what_lies_behind_it():
    assert len(workers.pack(torch.zeros(1_000_000)[:2])) < 1000


def test_an_exception_in_a_request_is_raised_in_its_place_and_the_next_results_follow(pool):
    calls = ({"value": 1}, {}, {"value": 3})
    results = pool.map(calls, method="echo")
    assert next(results) == 1
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'value'") as caught:
        next(results)
    assert "in the worker process:" in str(caught.value.__cause__) and "echo" in str(caught.value.__cause__)
    assert list(results) == [3]
    with pytest.raises(NotFiniteError) as caught:
        list(pool.map([{}], method="fail"))
    assert str(caught.value) == str(NotFiniteError("scores"))
    with pytest.raises(AttributeError, match="nothing"):
        list(pool.map([{}], method="nothing"))
    with pytest.raises(Exception, match="pickle"):
        list(pool.map([{}], method="give_what_cannot_travel"))
    with pytest.raises(IndexError):
        list(pool.map_rows([[1, 2], [49, 50]]))


def test_iterables_are_read_only_a_little_ahead(pool):
    taken = []
    results = pool.map(({"value": taken.append(number) or number} for number in range(1000)), method="echo")
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(taken) <= 3 + workers.AHEAD * pool.instances
    del results
    assert list(pool.map([{"value": "next"}], method="echo")) == ["next"]


def test_a_crashed_worker_is_replaced_and_its_request_tried_once_more(pool, tmp_path):
    first = {process for process, *_ in pool.map([{}] * 20, method="where")}
    (survivor,) = pool.map([{"marker": tmp_path / "died"}], method="die_once")
    assert survivor not in first
    results = pool.map([{"value": 0}], method="echo")
    assert list(results) == [0]
    results = pool.map([{}], method="die")
    with pytest.raises(WorkerCrashed, match=r"request 0 ended its worker process 2 times \(exit code -9\)") as caught:
        next(results)
    assert (caught.value.index, caught.value.exit_code) == (0, -9)
    assert list(pool.map([{"value": number} for number in range(5)], method="echo")) == list(range(5))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], r"row 1 is {'input_ids': \[0\]}"),
        ([[1, 2]], r"row 1 is {'input_ids': \[1, 2\]}"),
        ({"input_ids": [1, 2], "token_type_ids": [0]}, "row 1 is"),
        ({"attention_mask": [1, 1]}, "a dict of arrays .* with input_ids among them"),
    ],
)
def test_rows_that_are_none_are_refused(pool, row, message):
    with pytest.raises(ValueError, match=message):
        list(pool.map_rows([[1], row]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instances": 2, "threads_per_instance": 3}, "need 6 cores, and this process may use 4"),
        ({"threads_per_instance": 5}, "instances=1 of threads_per_instance=5 need 5 cores"),
        ({"instances": 0}, "must be at least 1; got instances=0"),
        ({"threads_per_instance": 0}, "must be at least 1; .*threads_per_instance=0"),
        ({}, "WorkerPool takes a transformers or longspan model, .*; got Linear"),
    ],
)
def test_pools_that_make_no_sense_are_refused(monkeypatch, options, message):
    monkeypatch.setattr(workers, "allowed_cores", lambda: [0, 1, 2, 3])
    with pytest.raises(ValueError, match=message):
        WorkerPool(torch.nn.Linear(1, 1), **options)


def test_what_loading_the_model_raises_is_raised_here(model, tmp_path):
    with pytest.raises(OSError, match="is not a directory"):
        WorkerPool(tmp_path / "nowhere")
    model.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(OSError, match="is a Fragile, which transformers lacks; give WorkerPool the model itself"):
        WorkerPool(tmp_path)
    BertConfig(architectures=["BertModel"], **SIZES).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="header"):  # in the worker
        WorkerPool(tmp_path, instances=1)


SCRIPT = """
import multiprocessing, signal, sys, time
from longspan.inference import WorkerPool

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born deaf to it
    with WorkerPool(sys.argv[1], instances=1, precision="bf16") as pool:
        for _ in range(2):
            (output,) = pool.map_rows([[5, 6, 7]])
            (worker,) = multiprocessing.active_children()
            try:
                print(worker.pid, *output.last_hidden_state.shape, flush=True)
                while True:  # not signal.pause(), which sleeps on where another thread takes the signal
                    time.sleep(0.05)
            except KeyboardInterrupt:
                pass
"""


def test_workers_outlive_an_interrupt_but_not_their_parent(tmp_path):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "model"],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as script:
        worker, *shape = map(int, script.stdout.readline().split())
        assert shape == [3, 32]
        os.killpg(script.pid, signal.SIGINT)  # as the terminal does
        assert int(script.stdout.readline().split()[0]) == worker
        (folder,) = temporary.iterdir()
        for number in range(2000):  # that take a moment to remove
            (folder / str(number)).touch()
        script.kill()
    deadline = time.monotonic() + 30
    while is_alive(worker) or list(temporary.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_reader_answers_in_workers_and_leaves_no_process_and_no_file(
    evidence_checkpoint,  # noqa: F811
    monkeypatch,
    tmp_path,
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reader = Reader(evidence_checkpoint, precision="fp32")
    questions = [{"question": "who wrote the report?", "documents": text} for text in (TEXT, "the red zoo " * 50)]
    others = set(multiprocessing.active_children())
    with WorkerPool(reader, instances=1) as pool:
        (process,) = set(multiprocessing.active_children()) - others
        for request, answer in zip(questions, pool.map(questions, method="answer"), strict=True):
            assert replace(answer, seconds=0) == replace(reader.answer(**request), seconds=0)
        with pytest.raises(QuestionError, match="the question is empty"):
            next(pool.map([{"question": " ", "documents": TEXT}], method="answer"))
        unfinished = pool.map(questions * 5, method="answer")
        next(unfinished)
    assert not process.is_alive()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="this WorkerPool is closed"):
        list(unfinished)
    with pytest.raises(RuntimeError, match="this WorkerPool is closed"):
        list(pool.map(questions))
