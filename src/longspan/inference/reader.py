"""The main job: a question and documents of any length in, the passages that answer it out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer

from longspan.errors import CheckpointError, QuestionError
from longspan.inference.documents import Document
from longspan.inference.evidence import EvidenceFinder, native_precision
from longspan.inference.extractive import SpanFinder
from longspan.inference.windows import Candidates, select_disjoint
from longspan.models.evidence import LongspanForEvidence
from longspan.models.heads import LongspanForQuestionAnswering
from longspan.models.packed import Precision
from longspan.models.plug_in import accelerate

BUILT_IN = Path(__file__).parents[1] / "data" / "reader"
CANDIDATES_PER_PASSAGE = 4  # looked at for each passage wanted, as some repeat a better one
SEQUENCE_WORDS = 8  # two texts that share so many words in a row share them by copying

if TYPE_CHECKING:
    from longspan.inference.compare import Comparison


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A piece of a document. The range counts characters of the document's text as it was read, the line from 1."""

    document: str
    start_char: int
    end_char: int
    line: int
    score: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What `Reader.answer` found.

    answer: the answer's text from an extractive question-answering model, None from the evidence reader.
    answer_probability: of that answer or, where there is none, of the best passage. passages: best first, scored with
    their probability. tokens: how many the documents have. seconds: reading time, without loading the model.
    """

    question: str
    answer: str | None
    answer_probability: float
    passages: tuple[Passage, ...]
    tokens: int
    seconds: float
    model: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passages": [asdict(passage) for passage in self.passages]}


class Reader:
    """Answers questions from long documents.

    model: the directory or hub name of an extractive question-answering checkpoint or of an evidence reader; None is
    the evidence reader that comes with longspan. precision: "fp32", "bf16" or "int8", what the encoder computes in;
    None is fp32, and for the evidence reader bf16 where the processor has instructions for it.
    Raises CheckpointError for anything else, NotImplementedError for a precision that the model's family cannot have.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str | torch.device = "cpu",
        precision: Precision | None = None,
    ):
        self.name = "longspan reader" if model is None else str(model)
        self.source = str(BUILT_IN if model is None else model)
        self.precision: Precision | None = precision
        self._finder = _load(self.source, torch.device(device), precision)

    @torch.inference_mode()
    def answer(
        self,
        question: str,
        documents: Sequence[Document | str] | Document | str,
        *,
        top: int = 3,
        passage_words: int = 100,
        progress: Callable[[int, int], None] | None = None,
    ) -> Answer:
        """The `top` passages of about `passage_words` words that answer `question`; no two overlap.

        documents: texts of any length; plain strings are named "document 1" and so on. progress: called with the number
        of tokens read and to read. Raises QuestionError, DocumentError and NotFiniteError.
        """
        documents = _as_documents(question, documents)
        if top < 1 or passage_words < 1:
            raise ValueError(f"top and passage_words must be at least 1; got top={top}, passage_words={passage_words}.")
        start = time.perf_counter()
        texts = [document.text for document in documents]
        found = self._finder.candidates(question, texts, passage_words=passage_words, progress=progress)
        best = _select_distinct(found, texts, top)
        passages = []
        for number in best:
            document, (start_char, end_char) = documents[found.document[number]], found.chars[number].tolist()
            passages.append(
                Passage(
                    document=document.name,
                    start_char=start_char,
                    end_char=end_char,
                    line=document.text.count("\n", 0, start_char) + 1,
                    score=float(found.probability[number]),
                    text=document.text[start_char:end_char],
                )
            )
        return Answer(
            question=question,
            answer=found.answer,
            answer_probability=passages[0].score,
            passages=tuple(passages),
            tokens=found.tokens,
            seconds=time.perf_counter() - start,
            model=self.name,
        )

    def compare(self, question: str, documents: Sequence[Document | str] | Document | str) -> Comparison:
        """The same reading by Hugging Face's own model, timed and held against this one's.

        Where the documents are longer than `COMPARED_TOKENS`, both read their beginning only. Raises what `answer`
        does, and NotImplementedError for a model that transformers cannot compute, or computes already.
        """
        texts = [document.text for document in _as_documents(question, documents)]
        from longspan.inference.compare import compare  # transformers' own models take seconds to import

        return compare(self._finder, self.source, question, texts)


def _as_documents(question: str, documents: Sequence[Document | str] | Document | str) -> list[Document]:
    if not question.strip():
        raise QuestionError("the question is empty; ask in one sentence, for example: who wrote the report?")
    if isinstance(documents, (str, Document)):
        documents = [documents]
    if not documents:
        raise ValueError("there are no documents to read; give at least one.")
    return [
        Document(f"document {number}", document) if isinstance(document, str) else document
        for number, document in enumerate(documents, start=1)
    ]


def _select_distinct(found: Candidates, texts: Sequence[str], top: int) -> list[int]:
    """Indices of the `top` best passages that neither overlap nor repeat each other, best first.

    A manual says the same thing in several places, and folders hold copies: a passage half of whose sequences of words
    stand in a better one is left out.
    """
    chosen: list[int] = []
    seen: set[tuple[str, ...]] = set()
    for number in select_disjoint(found.words, found.probability, CANDIDATES_PER_PASSAGE * top):
        start, end = found.chars[number].tolist()
        words = texts[int(found.document[number])][start:end].split()
        sequences = {tuple(words[i : i + SEQUENCE_WORDS]) for i in range(len(words) - SEQUENCE_WORDS + 1)}
        if len(sequences & seen) <= len(sequences) / 2:
            chosen.append(number)
            seen |= sequences
        if len(chosen) == top:
            break
    return chosen


def _load(model: str, device: torch.device, precision: Precision | None) -> EvidenceFinder | SpanFinder:
    """The finder for a checkpoint, on longspan's engine where that can compute the model, else on transformers'."""
    check_directory(model)
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        is_evidence = "LongspanForEvidence" in (config.architectures or ())
        ours: Any = LongspanForEvidence if is_evidence else LongspanForQuestionAnswering
        try:
            network, report = ours.from_pretrained(model, **options)
        except NotImplementedError:
            theirs: Any = AutoModelForQuestionAnswering
            network, report = theirs.from_pretrained(model, **options)
    except ImportError:
        raise
    except Exception as error:  # tokenizers and safetensors raise Exception itself for a damaged file
        raise CheckpointError(f"cannot load model {model}: {str(error).strip().splitlines()[0]}") from error
    if report["missing_keys"]:
        raise CheckpointError(
            f"model {model} is a {' or '.join(config.architectures or ['model'])}, not a reader: it has no "
            f"{', '.join(sorted(report['missing_keys'])[:2])}; give a question-answering checkpoint."
        )
    if not tokenizer.is_fast:
        raise CheckpointError(f"model {model} has only a slow tokenizer, which cannot say where a token stands.")
    network = network.to(device).eval()
    if isinstance(network, ours):
        precision = precision or network.config.precision  # that of a packed checkpoint
        if precision is None:
            native = native_precision(device)
            precision = native if is_evidence or native is None else "fp32"
        accelerate(network, precision)
    elif precision not in (None, "fp32"):
        raise NotImplementedError(
            f"model {model} is of a family that longspan leaves to transformers, which reads it in fp32; "
            f"leave precision {precision} out."
        )
    return EvidenceFinder(network, tokenizer) if is_evidence else SpanFinder(network, tokenizer)


def check_directory(model: str) -> None:
    """Names what a local model directory lacks; a hub name passes."""
    path = Path(model)
    if not path.is_dir():
        if path.exists() or path.is_absolute() or model.startswith("."):
            raise CheckpointError(f"model {model} is not a directory; give a model directory or a hub name.")
        return
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"model directory {model} has no config.json; give a directory that save_pretrained wrote."
        )
    if any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.ckpt")):
        raise CheckpointError(
            f"model directory {model} holds its weights only as a pickle, which can run any code when it is loaded; "
            "convert it to safetensors with a tool that you trust, for example save_pretrained of transformers."
        )
    raise CheckpointError(f"model directory {model} has no weights; it needs a model.safetensors.")
