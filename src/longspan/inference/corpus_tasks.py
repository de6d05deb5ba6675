"""The tasks: a vector, a label or answers of each document of a corpus.

Shapes: C model width, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from longspan.inference.corpus import import_pyarrow
from longspan.inference.corpus_worker import Read, Task
from longspan.inference.documents import Document
from longspan.inference.long_texts import LongTexts, load_network
from longspan.inference.reader import Reader, check_directory
from longspan.models import LongspanForSequenceClassification, LongspanModel
from longspan.models.packed import Precision

_SEVERAL_LABELS = "multi_label_classification"


@dataclass(frozen=True, kw_only=True)
class Embed(Task):
    """A vector for each document: the mean of the last hidden states of its tokens, the special ones included.

    A model whose position table is shorter than a document reads it in windows that overlap; each token counts once,
    from the window in whose middle it stands nearer (see `LongTexts`). precision: None is fp32.
    max_tokens: longer documents are cut; None cuts none. normalize: vectors of length 1.
    """

    model: str
    precision: Precision | None = None
    max_tokens: int | None = None
    normalize: bool = False
    name: ClassVar = "embed"

    def check(self) -> None:
        check_directory(self.model)

    def columns(self) -> dict[str, Any]:
        arrow = import_pyarrow()
        return {"embedding": arrow.list_(arrow.float32())}

    def load(self) -> Read:
        texts = LongTexts(*load_network(self.model, LongspanModel, AutoModel, self.precision), self.max_tokens)

        def sums(output: Any, row: int, counted: slice) -> Tensor:
            return output.last_hidden_state[row, counted].double().sum(0)  # [C]

        def read(documents: list[str]) -> list[dict[str, Any]]:
            rows = []
            for tokens, vector in texts.means(documents, sums, "vectors"):
                vector = vector / np.linalg.norm(vector) if self.normalize else vector
                rows.append({"tokens": tokens, "embedding": vector.astype(np.float32)})
            return rows

        return read


@dataclass(frozen=True, kw_only=True)
class Classify(Task):
    """The label of each document, and a score of every label.

    Scores are the softmax of the logits, for several labels at a time the sigmoid, for a regression the output itself,
    as in transformers' pipeline. A document longer than the model's position table is read in windows that overlap,
    and its logits are the mean of theirs, each weighted by the tokens that count in it (see `LongTexts`).
    precision: None is fp32. max_tokens: longer documents are cut; None cuts none.
    """

    model: str
    precision: Precision | None = None
    max_tokens: int | None = None
    name: ClassVar = "classify"

    def labels(self) -> list[str]:
        names = AutoConfig.from_pretrained(self.model).id2label or {}
        labels = [str(name) for _, name in sorted(names.items())]
        if len(set(labels)) < len(labels):
            raise ValueError(f"model {self.model} has labels of the same name: {', '.join(labels)}")
        return labels

    def check(self) -> None:
        check_directory(self.model)
        self.labels()

    def columns(self) -> dict[str, Any]:
        arrow = import_pyarrow()
        scores = arrow.struct([(label, arrow.float32()) for label in self.labels()])
        return {"label": arrow.string(), "score": arrow.float32(), "scores": scores}

    def load(self) -> Read:
        ours, theirs = LongspanForSequenceClassification, AutoModelForSequenceClassification
        network, tokenizer = load_network(self.model, ours, theirs, self.precision)
        texts, labels = LongTexts(network, tokenizer, self.max_tokens), self.labels()
        kind = network.config.problem_type

        def weighted(output: Any, row: int, counted: slice) -> Tensor:
            return output.logits[row].double() * (counted.stop - counted.start)  # [L]

        def read(documents: list[str]) -> list[dict[str, Any]]:
            rows = []
            for tokens, logits in texts.means(documents, weighted, "logits"):
                scores = torch.from_numpy(logits)
                if kind != "regression":
                    scores = scores.softmax(0) if kind != _SEVERAL_LABELS and len(labels) > 1 else scores.sigmoid()
                named = dict(zip(labels, scores.tolist(), strict=True))
                best = max(named, key=lambda label: named[label])
                rows.append({"tokens": tokens, "label": best, "score": named[best], "scores": named})
            return rows

        return read


@dataclass(frozen=True, kw_only=True)
class AnswerEach(Task):
    """The `top` passages of each document that answer the question, as `Reader.answer` finds them.

    model: a question-answering checkpoint; None is longspan's own reader. precision: None as the reader chooses.
    """

    question: str
    model: str | None = None
    precision: Precision | None = None
    top: int = 3
    name: ClassVar = "answer"

    def check(self) -> None:
        if self.model is not None:
            check_directory(self.model)
        if not self.question.strip() or self.top < 1:
            raise ValueError(f"a question and at least one passage are needed; got {self.question!r}, top={self.top}")

    def columns(self) -> dict[str, Any]:
        arrow = import_pyarrow()
        chars = {"start_char": arrow.int64(), "end_char": arrow.int64(), "line": arrow.int64()}
        passage = arrow.struct({"text": arrow.string()} | chars | {"score": arrow.float32()})
        columns = {"answer": arrow.string(), "answer_probability": arrow.float32()}
        return columns | {"passages": arrow.list_(passage)}

    def load(self) -> Read:
        reader = Reader(self.model, precision=self.precision)

        def read(documents: list[str]) -> list[dict[str, Any]]:
            rows = []
            for document in documents:
                row = reader.answer(self.question, Document("document", document), top=self.top).to_dict()
                rows.append({name: row[name] for name in ("tokens", "answer", "answer_probability", "passages")})
            return rows

        return read
