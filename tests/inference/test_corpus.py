import json
import os
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from longspan.inference import corpus as module
from longspan.inference.corpus import Corpus, in_chunks


def write_rows(file, rows):
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def read(path, **options):
    return [tuple(document) for document in Corpus(path=Path(path), **options)]


def test_every_file_of_a_folder_is_a_document_sorted_by_name(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("# second", encoding="utf-8")
    (tmp_path / "b" / "one").write_text("first", encoding="utf-8")
    (tmp_path / "c.html").write_text("<html><p>third</p></html>")
    (tmp_path / "a.txt").write_text("zeroth")
    (tmp_path / ".hidden").write_text("never")
    assert read(tmp_path) == [
        ("a.txt", "zeroth", None),
        ("b/one", "first", None),
        ("b/two.md", "# second", None),
        ("c.html", "third\n", None),
    ]
    assert read(tmp_path / "a.txt") == [("a.txt", "zeroth", None)]


def test_what_cannot_be_read_is_a_document_with_an_error(tmp_path):
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / os.fsdecode(b"z\xff")).write_text("a name that is no UTF-8")
    found = {name: (text, error) for name, text, error in read(tmp_path)}
    for name, message in (
        ("binary", "is a binary file"),
        ("empty", "is empty"),
        ("latin", "is not utf-8 text"),
        ("pdf", "is a PDF file"),
    ):
        assert found[name][0] is None and message in found[name][1]
    assert found["z?"] == ("a name that is no UTF-8", None)
    assert dict((name, text) for name, text, _ in read(tmp_path, encoding="latin-1"))["latin"] == "é"


def test_rows_of_json_lines_are_documents_and_bad_ones_have_an_error(tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = ['{"text": "one", "id": 7}', "", '{"text": "two"}', "{", "[1]", '{"text": null}', '{"text": 3}', '{"t": 1}']
    file.write_bytes("\n".join([*lines, '{"text": "\\ud800"}', '{"text": " "}']).encode() + b'\n{"text": "\xff"}')
    rows = read(file)
    assert rows[:2] == [("7", "one", None), ("1", "two", None)]
    assert [row[0] for row in rows[2:]] == [str(number) for number in range(2, 10)]
    assert all(text is None for _, text, _ in rows[2:])
    for (_, _, error), message in zip(
        rows[2:],
        (
            "document 2 is not JSON",
            "is a JSON list, no object",
            "holds no text: column 'text' is null",
            "holds no text: column 'text' is int",
            "has no column 'text'; it has 't'",
            "half of a surrogate pair",
            "is empty",
            "is not JSON: 'utf-8' codec",
        ),
        strict=True,
    ):
        assert message in error


def test_rows_of_parquet_are_documents(tmp_path):
    table = pyarrow.table({"id": ["x", None, "z"], "body": ["one", None, "three"], "key": [5, 6, 6]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    error = "document 1 holds no text: column 'body' is null."
    assert read(tmp_path / "rows.parquet", text_column="body") == [
        ("x", "one", None),
        ("1", None, error),
        ("z", "three", None),
    ]
    named = [name for name, *_ in read(tmp_path / "rows.parquet", text_column="body", id_column="key")]
    assert named == ["5", "6", "6"]
    coded = table.set_column(1, "body", table["body"].dictionary_encode())
    parquet.write_table(coded, tmp_path / "rows.parquet")
    assert [text for _, text, _ in read(tmp_path / "rows.parquet", text_column="body")] == ["one", None, "three"]


def test_a_folder_can_mix_files_of_rows_and_documents(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two", "id": "x"}])
    parquet.write_table(pyarrow.table({"text": ["three"]}), tmp_path / "b.PARQUET")
    (tmp_path / "c.txt").write_text("four")
    assert [row[:2] for row in read(tmp_path)] == [
        ("a.jsonl:0", "one"),
        ("x", "two"),
        ("b.PARQUET:0", "three"),
        ("c.txt", "four"),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_without_the_column_is_refused_with_the_columns_that_it_has(tmp_path, kind):
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_rows(file, [{"body": "one", "title": 1}])
    else:
        parquet.write_table(pyarrow.table({"body": ["one"], "title": [1]}), file)
    with pytest.raises(ValueError, match=r"has no column 'text'; it has 'body', 'title': .* --text-column"):
        Corpus(path=tmp_path)
    with pytest.raises(ValueError, match=r"has no column 'name'; it has 'body', 'title': .* --id-column"):
        Corpus(path=file, text_column="body", id_column="name")


def test_corpora_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give a folder of documents"):
        Corpus(path=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a folder without files"):
        Corpus(path=tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="unknown text encoding 'klingon'"):
        Corpus(path=tmp_path, encoding="klingon")
    (tmp_path / "b.jsonl").write_text("one\n")
    with pytest.raises(ValueError, match="is no JSON Lines file: its first row is not JSON"):
        Corpus(path=tmp_path)
    (tmp_path / "b.jsonl").rename(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="is no Parquet file, or a damaged one"):
        Corpus(path=tmp_path)
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"column 'text' of .* is int64, not text"):
        Corpus(path=tmp_path)


def test_finished_documents_are_left_out_as_often_as_they_were_finished_and_not_read(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_text(name)
    write_rows(tmp_path / "rows.jsonl", [{"text": str(number), "id": "x"} for number in range(3)])
    opened = []
    monkeypatch.setattr(
        module, "read_document", lambda file, **_: opened.append(file.name) or pytest.fail("read again")
    )
    finished = Counter({"a": 1, "b": 1, "c": 1, "x": 2, "gone": 1})
    left = list(Corpus(path=tmp_path).unfinished(finished))
    assert [document.text for document in left] == ["2"] and not opened
    assert finished == Counter({"a": 1, "b": 1, "c": 1, "x": 2, "gone": 1})


def test_chunks_hold_few_documents_and_few_characters_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_DOCUMENTS", 3)
    monkeypatch.setattr(module, "CHUNK_CHARS", 10)
    lengths = [1, 2, 3, 4, 6, 30, 10, 1, 1, 1, 1]
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "x" * length} for length in lengths])
    chunks = [[len(document.text) for document in chunk] for chunk in in_chunks(Corpus(path=file), Counter())]
    assert chunks == [[1, 2, 3], [4, 6], [30], [10], [1, 1, 1], [1]]


def test_documents_are_read_one_at_a_time(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_text(name)
    documents = iter(Corpus(path=tmp_path))
    assert next(documents).text == "a"
    (tmp_path / "c").write_text("changed")
    (tmp_path / "d").unlink()
    left = list(documents)
    assert left[1].text == "changed"
    assert left[2].text is None and "does not exist" in left[2].error


def test_without_pyarrow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'longspan\[corpus\]'"):
        module.import_pyarrow()
