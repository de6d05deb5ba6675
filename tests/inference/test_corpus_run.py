import errno
import json
import resource
from collections import Counter
from contextlib import contextmanager

import pyarrow
import pytest
from pyarrow import parquet
from tests.inference.breaking_task import Lengths

from longspan.inference import corpus as corpora
from longspan.inference import corpus_pool, corpus_run, workers
from longspan.inference.corpus import Corpus, CorpusDocument
from longspan.inference.corpus_pool import on_pool
from longspan.inference.corpus_run import run_corpus
from longspan.inference.corpus_worker import CRASHED, TaskWorker
from longspan.inference.workers import WorkerCrashed

NAMES = [f"{number:02}" for number in range(20)]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Twenty documents, the fourth of them empty, in chunks of two and parts of five."""
    monkeypatch.setattr(corpora, "CHUNK_DOCUMENTS", 2)
    monkeypatch.setattr(corpus_run, "PART_DOCUMENTS", 5)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_text("x" * number * (number != 3) + " ." * (number != 3))
    return Corpus(path=folder)


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    """The worker in this process, in place of the pool. Ends after `most` chunks, like a user who presses Ctrl-C."""

    def here(task, chunks, **_):
        worker = TaskWorker(task)
        for number, chunk in enumerate(chunks):
            if number == here.most:
                raise KeyboardInterrupt
            here.chunks += 1
            yield worker.table(chunk)

    here.most, here.chunks = None, 0
    monkeypatch.setattr(corpus_run, "on_pool", here)
    return here


def part_sizes(out):
    return [parquet.read_metadata(part).num_rows for part in sorted(out.glob("part-*.parquet"))]


def test_a_run_writes_a_row_a_document_in_order_and_a_folder_that_reads_as_one_table(corpus, tmp_path):
    seen = []
    out = tmp_path / "a" / "out"
    done = run_corpus(Lengths(), corpus, out, progress=lambda *counts: seen.append(counts))
    table = parquet.read_table(out)
    assert table["id"].to_pylist() == NAMES
    assert table["tokens"].to_pylist() == [None if number == 3 else number + 2 for number in range(20)]
    assert [number for number, error in enumerate(table["error"].to_pylist()) if error] == [3]
    assert table.schema.equals(Lengths().schema())
    assert (done.documents, done.errors, done.skipped) == (20, 1, 0) and "is empty" in done.first_error
    assert seen == [(2 * number, int(number > 1)) for number in range(1, 11)]
    assert part_sizes(out) == [6, 6, 6, 2]
    assert {file.name[:5] for file in out.iterdir()} == {"part-", "_run."}


def test_a_run_that_is_stopped_keeps_its_rows_and_goes_on(corpus, tmp_path, engine):
    out = tmp_path / "out"
    engine.most = 4
    with pytest.raises(KeyboardInterrupt):
        run_corpus(Lengths(), corpus, out)
    assert part_sizes(out) == [6, 2]
    torso = out / ".part-00002.parquet.1.partial"
    torso.write_text("PAR1")
    engine.most, engine.chunks = None, 0
    done = run_corpus(Lengths(), corpus, out)
    assert (done.documents, done.skipped, engine.chunks) == (12, 8, 6)
    assert parquet.read_table(out)["id"].to_pylist() == NAMES and not torso.exists()
    assert part_sizes(out) == [6, 2, 6, 6]
    engine.most = 0  # nothing is left: no worker starts
    assert run_corpus(Lengths(), corpus, out).skipped == 20


def test_a_corpus_that_has_grown_gets_the_rows_that_it_lacks(corpus, tmp_path):
    out = tmp_path / "out"
    run_corpus(Lengths(), corpus, out)
    (corpus.path / "05a").write_text("new")
    assert run_corpus(Lengths(), corpus, out).documents == 1
    assert Counter(parquet.read_table(out)["id"].to_pylist()) == Counter([*NAMES, "05a"])


def test_documents_that_share_an_id_are_all_written_also_by_a_run_that_goes_on(tmp_path, engine, monkeypatch):
    monkeypatch.setattr(corpora, "CHUNK_DOCUMENTS", 1)
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text("".join(json.dumps({"id": "x", "text": "y" * length}) + "\n" for length in (1, 2, 3)))
    engine.most = 2
    with pytest.raises(KeyboardInterrupt):
        run_corpus(Lengths(), Corpus(path=rows), out)
    engine.most = None
    assert run_corpus(Lengths(), Corpus(path=rows), out).documents == 1
    assert parquet.read_table(out)["tokens"].to_pylist() == [1, 2, 3]


def test_rows_do_not_wait_longer_than_a_minute(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_run, "PART_SECONDS", -1)
    run_corpus(Lengths(), corpus, tmp_path / "out")
    assert part_sizes(tmp_path / "out") == [2] * 10


@contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_with_whole_files_and_a_word_on_what_to_do(corpus, tmp_path, engine):
    out = tmp_path / "out"
    engine.most = 3
    with pytest.raises(KeyboardInterrupt):
        run_corpus(Lengths(), corpus, out)
    engine.most = None
    message = r"cannot write .*part-00001.parquet: .*\. The files before it are whole: make room and repeat the command"
    with files_of_at_most(500), pytest.raises(OSError, match=message) as caught:
        run_corpus(Lengths(), corpus, out)
    assert caught.value.__cause__.errno in (errno.EFBIG, errno.ENOSPC)
    assert sorted(file.name for file in out.iterdir()) == ["_run.json", "part-00000.parquet"]
    run_corpus(Lengths(), corpus, out)
    assert parquet.read_table(out)["id"].to_pylist() == NAMES


def test_runs_that_do_not_fit_are_refused_before_anything_is_written(corpus, tmp_path):
    out = tmp_path / "out"
    for options, message in (
        ({"engine": "spark"}, "there is no engine 'spark'; there are local and ray"),
        ({"address": "127.0.0.1:6379"}, "an address is that of a Ray cluster: choose the engine ray"),
    ):
        with pytest.raises(ValueError, match=message):
            run_corpus(Lengths(), corpus, out, **options)
    with pytest.raises(ValueError, match="the marker is nowhere"):
        run_corpus(Lengths(marker="nowhere"), corpus, out)
    with pytest.raises(ValueError, match="lies in the corpus .*, which would read what it writes"):  # noqa: RUF043
        run_corpus(Lengths(), corpus, corpus.path / "a" / "out")
    assert not out.exists() and not (corpus.path / "a").exists()
    with pytest.raises(FileExistsError, match="exists and holds no run to go on with"):
        run_corpus(Lengths(), Corpus(path=corpus.path / "00"), corpus.path)


def test_a_folder_of_another_run_is_refused(corpus, tmp_path):
    out = tmp_path / "out"
    run_corpus(Lengths(), corpus, out)
    with pytest.raises(ValueError, match="holds a run with other arguments: marker was '' and is 'other'"):
        run_corpus(Lengths(marker="other"), corpus, out)
    with pytest.raises(ValueError, match="text_column was 'text' and is 'body'"):
        run_corpus(Lengths(), Corpus(path=corpus.path, text_column="body"), out)


def test_two_runs_do_not_write_to_one_folder(corpus, tmp_path):
    out, refused = tmp_path / "out", []

    def run_again(*_):
        with pytest.raises(BlockingIOError, match=r"another run is writing to .+: wait until it has ended"):
            run_corpus(Lengths(), corpus, out)
        refused.append(True)

    assert run_corpus(Lengths(), corpus, out, progress=run_again).documents == 20 and refused
    assert run_corpus(Lengths(), corpus, out).skipped == 20


def chunks_of(*texts):
    return [[CorpusDocument(text, text, None)] for text in texts]


def test_the_pool_gives_the_rows_of_one_process_loses_none_and_reads_little_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "allowed_cores", lambda: [0, 0])
    task = Lengths(marker=str(tmp_path / "died"))
    texts = ["x" * length for length in range(1, 30)] + ["die once"] + ["x" * length for length in range(30, 60)]
    read, tables = [], []
    chunks = (read.append(chunk) or chunk for chunk in chunks_of(*texts))
    for table in on_pool(task, chunks, instances=2, threads_per_instance=1):
        tables.append(table)
        assert len(read) <= len(tables) + 2 * workers.AHEAD
    table = pyarrow.concat_tables(tables)
    assert (tmp_path / "died").exists()
    assert table["id"].to_pylist() == texts and table["tokens"].to_pylist() == list(map(len, texts))
    assert table["error"].null_count == len(texts)
    assert len(set(table["process"].to_pylist())) == 3


class Fragile:
    """A pool whose worker is in this process, and ends with a document that says so."""

    def __init__(self, worker, **_):
        self.worker = worker()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, requests, method):
        class Results:
            def __next__(results):
                request = next(requests)
                if any(document.text in ("die", "never start") for document in request["documents"]):
                    raise WorkerCrashed(None if request["documents"][0].text == "never start" else 0, -9)
                return getattr(self.worker, method)(**request)

        requests = iter(requests)
        return Results()


def test_a_document_that_ends_its_processes_gets_an_error_and_its_neighbors_their_rows(monkeypatch):
    monkeypatch.setattr(corpus_pool, "WorkerPool", Fragile)
    chunk = [CorpusDocument(text, text, None) for text in ("one", "die", "three")]
    tables = on_pool(Lengths(), iter([chunk, *chunks_of("four")]), instances=1, threads_per_instance=1)
    table = pyarrow.concat_tables(tables)
    assert table["id"].to_pylist() == ["one", "die", "three", "four"]
    assert table["tokens"].to_pylist() == [3, None, 5, 4] and table["error"].to_pylist()[1] == CRASHED
    with pytest.raises(WorkerCrashed):
        list(on_pool(Lengths(), iter(chunks_of("never start")), instances=1, threads_per_instance=1))
