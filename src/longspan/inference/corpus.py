"""Corpora: the documents of a folder, or the rows of Parquet and JSON Lines files, one at a time."""

from __future__ import annotations

import codecs
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longspan.errors import DocumentError
from longspan.inference.documents import read_document

PARQUET, JSON_LINES = (".parquet",), (".jsonl", ".ndjson")
ROWS_READ_TOGETHER = 16  # of a Parquet file; a row can be a book
CHUNK_DOCUMENTS, CHUNK_CHARS = 16, 250_000  # what a worker takes at a time; a longer document goes by itself


class CorpusDocument(NamedTuple):
    """A document to read, or why it cannot be read: one of text and error is None."""

    id: str
    text: str | None
    error: str | None


Chunk = Sequence[CorpusDocument]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The documents at `path`, in the order of their names and rows; never more than a few in memory.

    path: a folder, in which every file is a document, also in folders below it, except those whose names begin with a
    dot; a Parquet or JSON Lines file (.parquet, .jsonl, .ndjson), in which every row is one; or a folder with such
    files. encoding: of text files, as `read_document` takes it.
    A row's id is that in `id_column` (None: the column "id", if there is one), else its number, counted from 0; in a
    folder that of a file is its path there, and that of a row without an id the path, a colon and the number.
    What cannot be read of single documents becomes their `error`. Raises FileNotFoundError, and ValueError for files
    without the columns, damaged ones and a folder without files.
    """

    path: Path
    text_column: str = "text"
    id_column: str | None = None
    encoding: str | None = None

    def __post_init__(self):
        if not self.path.exists():
            raise FileNotFoundError(
                f"corpus {self.path} does not exist; give a folder of documents, or a .parquet or .jsonl file"
            )
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                raise ValueError(
                    f"unknown text encoding {self.encoding!r}; Python knows for example utf-8, latin-1 and utf-16"
                ) from None
        is_empty = True
        for _, file in self._files():
            is_empty = False
            if file.suffix.lower() in PARQUET:
                self._check_parquet(file)
            elif file.suffix.lower() in JSON_LINES:
                self._check_json_lines(file)
        if is_empty:
            raise ValueError(f"corpus {self.path} is a folder without files")

    def __iter__(self) -> Iterator[CorpusDocument]:
        return self.unfinished(Counter())

    def unfinished(self, finished: Counter[str]) -> Iterator[CorpusDocument]:
        """The documents without the `finished` ids; an id that occurs twice is left out as often as it was finished."""
        finished = finished.copy()
        for name, read in self._entries():
            if finished[name]:
                finished[name] -= 1
            else:
                yield read()

    def _entries(self) -> Iterator[tuple[str, Callable[[], CorpusDocument]]]:
        """The id of each document, and what reads it."""
        for name, file in self._files():
            if file.suffix.lower() not in PARQUET + JSON_LINES:
                yield name, lambda name=name, file=file: self._read_file(name, file)
                continue
            prefix = "" if self.path.is_file() else f"{name}:"
            rows = self._parquet_rows if file.suffix.lower() in PARQUET else self._json_rows
            for number, (row, error) in enumerate(rows(file)):
                id_column = self.id_column or "id"
                name = row.get(id_column)
                name = f"{prefix}{number}" if name is None else _valid(str(name))
                document = self._checked(name, row, error)
                yield name, lambda document=document: document

    def _files(self) -> Iterator[tuple[str, Path]]:
        """(name in the corpus, file) of every file."""
        if self.path.is_file():
            yield _valid(self.path.name), self.path
        else:
            for file in _walk(self.path):
                yield _valid(file.relative_to(self.path).as_posix()), file

    def _read_file(self, name: str, file: Path) -> CorpusDocument:
        try:
            return CorpusDocument(name, read_document(file, encoding=self.encoding).text, None)
        except (DocumentError, OSError) as error:
            return CorpusDocument(name, None, str(error))

    def _checked(self, name: str, row: dict[str, Any], error: str | None) -> CorpusDocument:
        text = row.get(self.text_column)
        if error is None and self.text_column not in row:
            error = f"has no column {self.text_column!r}; it has {', '.join(map(repr, row)) or 'none'}"
        elif error is None and not isinstance(text, str):
            error = f"holds no text: column {self.text_column!r} is {'null' if text is None else type(text).__name__}"
        elif error is None and isinstance(text, str) and not text.strip():
            error = "is empty: it holds no text"
        elif error is None and isinstance(text, str) and _valid(text) != text:
            error = "is no valid Unicode: it holds half of a surrogate pair"
        if error is not None:
            return CorpusDocument(name, None, f"document {name} {error}.")
        return CorpusDocument(name, text, None)

    def _parquet_rows(self, file: Path) -> Iterator[tuple[dict[str, Any], None]]:
        from pyarrow import parquet

        with parquet.ParquetFile(file) as rows:
            columns = [name for name in (self.text_column, self.id_column or "id") if name in rows.schema_arrow.names]
            for batch in rows.iter_batches(ROWS_READ_TOGETHER, columns=list(dict.fromkeys(columns))):
                for row in batch.to_pylist():
                    yield row, None

    def _json_rows(self, file: Path) -> Iterator[tuple[dict[str, Any], str | None]]:
        with file.open("rb") as lines:
            for line in lines:
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8
                        yield {}, f"is not JSON: {error}"
                        continue
                    yield (row, None) if isinstance(row, dict) else ({}, f"is a JSON {type(row).__name__}, no object")

    def _check_parquet(self, file: Path) -> None:
        pyarrow = import_pyarrow()
        from pyarrow import parquet

        try:
            schema = parquet.read_schema(file)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{file} is no Parquet file, or a damaged one: {error}") from error
        self._check_columns(file, schema.names)
        kind = schema.field(self.text_column).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"column {self.text_column!r} of {file} is {kind}, not text; name another: --text-column")

    def _check_json_lines(self, file: Path) -> None:
        for row, error in self._json_rows(file):
            if error is not None:
                raise ValueError(f"{file} is no JSON Lines file: its first row {error}")
            self._check_columns(file, list(row))
            return

    def _check_columns(self, file: Path, there: list[str]) -> None:
        for column, option in ((self.text_column, "--text-column"), (self.id_column, "--id-column")):
            if column is not None and column not in there:
                raise ValueError(
                    f"{file} has no column {column!r}; it has {', '.join(map(repr, there)) or 'none'}: name one of "
                    f"them with {option}"
                )


def in_chunks(corpus: Corpus, finished: Counter[str]) -> Iterator[Chunk]:
    """The documents that are not finished, a few at a time. Decided by them alone: the rows of a chunk are computed
    together, and are the same wherever that is."""
    chunk: list[CorpusDocument] = []
    chars = 0
    for document in corpus.unfinished(finished):
        length = len(document.text or "")
        if chunk and (len(chunk) == CHUNK_DOCUMENTS or chars + length > CHUNK_CHARS):
            yield chunk
            chunk, chars = [], 0
        chunk.append(document)
        chars += length
    if chunk:
        yield chunk


def import_pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("corpora are read from and written to Parquet: pip install 'longspan[corpus]'") from error
    return pyarrow


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below the folder, sorted by name; links to folders are not followed."""
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def _valid(text: str) -> str:
    """The text with a question mark for what UTF-8 cannot write."""
    return text.encode("utf-8", "replace").decode("utf-8")
