import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tests.inference.breaking_task import Lengths

from longspan.inference import corpus_ray
from longspan.inference.corpus import Corpus, CorpusDocument, in_chunks
from longspan.inference.corpus_ray import _Actor, _packed, on_ray
from longspan.inference.corpus_run import run_corpus
from longspan.inference.corpus_worker import CRASHED, TaskWorker
from longspan.inference.worker_process import unpack

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")  # Ray's own, of its own options


@pytest.fixture(scope="module")
def local_ray():
    """Ray as the command starts it where no address is given, on two cores."""
    pytest.importorskip("ray.data")
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_ray, "allowed_cores", lambda: [0, 1])
        for name, value in corpus_ray._LOCAL.items():  # so that it is gone afterwards
            patch.setenv(name, value)
        with corpus_ray._connected(None):
            yield ray
    assert not ray.is_initialized()


@pytest.fixture
def rows(tmp_path):
    def write(*texts):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return Corpus(path=file)

    return write


def chunk(*texts):
    return [CorpusDocument(text, text, None) for text in texts]


def in_this_process(task, corpus):
    worker = TaskWorker(task)
    return pyarrow.concat_tables([worker.table(chunk) for chunk in in_chunks(corpus, Counter())])


def test_actors_give_the_rows_of_one_process_and_one_that_is_killed_loses_none(local_ray, rows, tmp_path):
    texts = ["x" * length for length in range(1, 200)]
    texts[20], texts[90], texts[150] = "fail", None, "die once"
    task, corpus, out = Lengths(marker=str(tmp_path / "died")), rows(*texts), tmp_path / "out"
    done = run_corpus(task, corpus, out, engine="ray")
    assert (tmp_path / "died").exists()
    table = parquet.read_table(out)
    assert table.drop(["process"]).equals(in_this_process(task, corpus).drop(["process"]))
    assert (done.documents, done.errors) == (199, 2)
    assert run_corpus(task, corpus, out, engine="ray").skipped == 199


def test_more_threads_than_the_cluster_has_cores_are_refused(local_ray):
    with pytest.raises(ValueError, match="instances=2 of threads_per_instance=2 need 4 cores, and Ray has 2"):
        next(on_ray(Lengths(), list, instances=2, threads_per_instance=2, address=None))


def test_another_process_joins_by_the_address(local_ray):
    code = (
        "import sys; from longspan.inference.corpus_ray import _connected\n"
        "with _connected(sys.argv[1]) as ray: print(int(ray.cluster_resources()['CPU']))"
    )
    address = local_ray.get_runtime_context().gcs_address
    done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "2"


class Attempts:
    """Stands for the actor that counts, without Ray."""

    def __init__(self, monkeypatch):
        counts = Counter()
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda value: value))
        self.begin = SimpleNamespace(remote=lambda work: counts.update([work]) or counts[work])
        self.end = SimpleNamespace(remote=counts.pop)


def sent(*chunks):
    """The batches that actors get of these chunks."""
    return [
        pyarrow.table({"chunk": pyarrow.array([packed], pyarrow.large_binary())}) for packed in _packed(lambda: chunks)
    ]


def received(table):
    (packed,) = table["table"]
    return unpack(packed.as_py())


def test_a_document_that_ends_actors_again_and_again_gets_an_error_and_its_neighbors_their_rows(monkeypatch):
    attempts = Attempts(monkeypatch)
    first, second = sent(chunk("one"), chunk("one", "die", "three"))

    class Died(BaseException):
        pass

    def read(texts):
        if "die" in texts:
            raise Died
        return [{"tokens": len(text)} for text in texts]

    deaths, tables = 0, []
    while len(tables) < 2:
        actor = _Actor(Lengths(), torch.get_num_threads(), attempts)  # as Ray starts it anew
        actor.worker.read = read
        with suppress(Died):
            tables.append(received(actor((first, second)[len(tables)])))
            continue
        deaths += 1
    assert deaths == 2 * corpus_ray.ATTEMPTS  # with its neighbors, then alone
    assert tables[0]["tokens"].to_pylist() == [3]
    assert tables[1]["tokens"].to_pylist() == [3, None, 5]
    assert tables[1]["error"].to_pylist() == [None, CRASHED, None]


def test_what_loading_reading_and_computing_raise_is_raised_where_the_rows_are_wanted(monkeypatch):
    attempts = Attempts(monkeypatch)
    (batch,) = sent(chunk("one"))
    with pytest.raises(OSError, match="the task is broken"):
        received(_Actor(Lengths(marker="broken"), torch.get_num_threads(), attempts)(batch))
    (batch,) = sent(chunk("cannot"))
    with pytest.raises(NotImplementedError, match="no kernel"):
        received(_Actor(Lengths(), torch.get_num_threads(), attempts)(batch))

    def torn():
        yield chunk("one")
        raise OSError("the disk is gone")

    one, gone = _packed(torn)
    assert unpack(one) == (0, chunk("one"))
    with pytest.raises(OSError, match="the disk is gone"):
        unpack(gone)


def test_addresses_where_no_ray_answers_are_refused_soon(monkeypatch):
    pytest.importorskip("ray.data")
    monkeypatch.setattr(corpus_ray, "CONNECT_SECONDS", 0.5)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer():
            silent, _ = server.accept()
            other, _ = server.accept()
            with silent, other:
                other.recv(100)
                other.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                silent.recv(100)
                silent.recv(100)  # until the other side has had enough

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        start = time.monotonic()
        for message in ("timed out", "what listens there is something else"):
            with pytest.raises(ConnectionError, match=f"no Ray cluster answers at .*{port} .*{message}"):
                next(on_ray(Lengths(), list, instances=1, threads_per_instance=1, address=f"127.0.0.1:{port}"))
        thread.join()
    with pytest.raises(ConnectionError, match=r"Connection refused.*ray start --head"):
        next(on_ray(Lengths(), list, instances=1, threads_per_instance=1, address=f"ray://127.0.0.1:{port}"))
    assert time.monotonic() - start < 20
    for address in ("auto", "cluster:", ":6379"):
        with pytest.raises(ValueError, match="a Ray address is HOST:PORT"):
            next(on_ray(Lengths(), list, instances=1, threads_per_instance=1, address=address))


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"the engine ray needs Ray Data: pip install 'longspan\[ray\]'"):
        next(on_ray(Lengths(), list, instances=1, threads_per_instance=1, address=None))
