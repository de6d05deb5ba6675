"""A task in a worker's hands: what is done with each document of a corpus, and the rows that come of it.

A `Task` is a description that travels to the workers; `TaskWorker` is the task with its model loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from longspan.errors import CheckpointError, DocumentError, NotFiniteError
from longspan.inference.corpus import Chunk, CorpusDocument, import_pyarrow

Read = Callable[[list[str]], list[dict[str, Any]]]  # texts -> a row of each
ATTEMPTS = 2  # to read a document that ends its process
CRASHED = f"reading this document ended its process {ATTEMPTS} times; perhaps it needs more memory than there is."


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What to do with each document. Its fields decide the rows, and a run is known by them."""

    name: ClassVar[str]

    @abstractmethod
    def check(self) -> None:
        """Raises what can be known to be wrong before any worker starts."""

    @abstractmethod
    def columns(self) -> dict[str, Any]:
        """pyarrow's types of the columns after id, error and tokens."""

    @abstractmethod
    def load(self) -> Read:
        """The model, ready to read. Raises what loading it raises."""

    def schema(self) -> Any:
        """The columns of the rows: what a document with an error lacks is null."""
        arrow = import_pyarrow()
        first = {"id": arrow.string(), "error": arrow.string(), "tokens": arrow.int64()}
        return arrow.schema(first | self.columns())


class TaskWorker:
    """A task with its model loaded. Raises what `task.load` raises."""

    def __init__(self, task: Task):
        self.schema, self.read = task.schema(), task.load()

    @torch.inference_mode()
    def table(self, documents: Chunk) -> Any:
        """A row of each document, in a pyarrow.Table. What a document makes the model raise becomes its error."""
        found = iter(self._read_or_explain([document.text for document in documents if document.text is not None]))
        rows = [
            {"id": document.id, "error": document.error} | ({} if document.text is None else next(found))
            for document in documents
        ]
        return import_pyarrow().Table.from_pylist(rows, schema=self.schema)

    def _read_or_explain(self, texts: list[str]) -> list[dict[str, Any]]:
        try:
            return self.read(texts) if texts else []
        except (NotImplementedError, CheckpointError):  # of the model, not of a document
            raise
        except (DocumentError, NotFiniteError, MemoryError, RuntimeError) as error:
            if len(texts) == 1:
                return [{"error": str(error) or type(error).__name__}]
        return [row for text in texts for row in self._read_or_explain([text])]  # the others are as good as before


def one_by_one(task: Task, chunk: Chunk, alone: Callable[[int, CorpusDocument], Any]) -> Any:
    """The table of a chunk with a document in it that ends the process. alone: a table, None for that document."""
    pyarrow = import_pyarrow()
    tables = []
    for place, document in enumerate(chunk):
        table = alone(place, document)
        if table is None:
            table = pyarrow.Table.from_pylist([{"id": document.id, "error": CRASHED}], schema=task.schema())
        tables.append(table)
    return pyarrow.concat_tables(tables)
