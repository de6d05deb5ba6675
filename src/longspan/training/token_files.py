"""Token files: a text turned into ids once, and mapped into memory by every run that reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from longspan.models.convert import whole_or_absent
from longspan.models.text_tokenizers import bpe_tokenizer, byte_tokenizer, character_tokenizer, encode, tokenization_of
from longspan.training.texts import SPLITS, Part, Texts

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """A tokenizer and the ids of three splits.

    splits: ids of "train", "dev" and "test", memory-mapped and read-only. [n] uint8, uint16 or uint32
    units: characters of each split, or bytes where a token is a byte; what "bits per character" divides by.
    fingerprint: the same for the same ids of the same vocabulary.
    """

    folder: Path
    tokenizer: Any
    splits: dict[str, Array]
    units: dict[str, int]
    fingerprint: str
    about: str

    @property
    def unit(self) -> str:
        return unit_of(self.tokenizer)


def unit_of(tokenizer: Any) -> str:
    """What text is counted in: "byte" where a token is one, as is usual for enwik8, else "character"."""
    return "byte" if tokenization_of(tokenizer) == "byte" else "character"


def make_token_files(
    texts: Texts,
    folder: str | Path,
    tokenizer: Any = "character",
    *,
    vocab_size: int = 8192,
    alphabet: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> TokenFiles:
    """The token files in `folder`, written whole or not at all, or those that are there already if they are the same.

    tokenizer: "character" (the characters of all splits, or of `alphabet`, which the text must keep to), "byte", "bpe"
    (learnt from the training split, up to `vocab_size` pieces), or a tokenizer.
    ValueError for files of other texts or another tokenizer, text that is no UTF-8, and characters outside `alphabet`.
    """
    folder = Path(folder)
    described = tokenizer if isinstance(tokenizer, str) else _vocabulary(tokenizer)
    if tokenizer == "bpe":
        described = f"bpe {vocab_size}"
    elif tokenizer == "character" and alphabet is not None:
        described = f"character {alphabet!r}"
    sources = {split: [_source(part) for part in texts.splits[split]] for split in SPLITS}
    if (folder / "tokens.json").is_file():
        found = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        if found["tokenizer"] != described:
            raise ValueError(
                f"{folder} holds tokens of another tokenizer ({found['tokenizer']}; wanted: {described}): name another "
                f"folder, or remove it"
            )
        same_files = {split: found["splits"][split]["sources"] for split in SPLITS} == sources
        if not same_files and any(_digest(texts, split) != found["splits"][split]["sha256"] for split in SPLITS):
            raise ValueError(
                f"{folder} holds tokens of another text than {texts.name}: name another folder, or remove it"
            )
        return load_token_files(folder)
    tell(f"tokens of {texts.name}: {texts.about}")
    made = _tokenizer(texts, tokenizer, vocab_size, alphabet) if isinstance(tokenizer, str) else tokenizer
    kind = _smallest_type(len(made))
    with whole_or_absent(folder) as writing:
        splits = {}
        for split in SPLITS:
            digest, tokens, units = hashlib.sha256(), 0, 0
            with (writing / f"{split}.bin").open("wb") as file:
                for piece in _checked(texts, split, made):
                    digest.update(piece)
                    ids = encode(made, piece).astype(kind)
                    ids.tofile(file)
                    tokens += len(ids)
                    units += len(piece) if tokenization_of(made) == "byte" else len(piece.decode())
            splits[split] = {"tokens": tokens, "units": units, "sha256": digest.hexdigest(), "sources": sources[split]}
            tell(f"{split}: {tokens:,} tokens of {units:,} {unit_of(made)}s")
        made.save_pretrained(writing)
        summary = {"about": texts.about, "tokenizer": described, "dtype": np.dtype(kind).name, "splits": splits}
        (writing / "tokens.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return load_token_files(folder)


def load_token_files(folder: str | Path) -> TokenFiles:
    """What `make_token_files` wrote. FileNotFoundError where it wrote nothing, ValueError for files cut short."""
    folder = Path(folder)
    if not (folder / "tokens.json").is_file():
        raise FileNotFoundError(f"{folder} holds no token files: it has no tokens.json")
    found = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    kind = np.dtype(found["dtype"])
    splits: dict[str, Array] = {}
    for split, described in found["splits"].items():
        path = folder / f"{split}.bin"
        if path.stat().st_size != described["tokens"] * kind.itemsize:
            raise ValueError(f"{path} should hold {described['tokens']:,} tokens and does not: remove {folder}")
        empty = not described["tokens"]
        splits[split] = np.empty(0, kind) if empty else np.memmap(path, kind, mode="r")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    digest = hashlib.sha256(_vocabulary(tokenizer).encode())
    for split in SPLITS:
        digest.update(found["splits"][split]["sha256"].encode())
    return TokenFiles(
        folder=folder,
        tokenizer=tokenizer,
        splits=splits,
        units={split: found["splits"][split]["units"] for split in SPLITS},
        fingerprint=digest.hexdigest()[:16],
        about=found["about"],
    )


def encode_texts(texts: Texts, split: str, tokenizer: Any) -> tuple[Array, int]:
    """Ids of a split, or of "all", and how many characters (bytes, for a tokenizer of bytes) they stand for."""
    kind, ids, units = _smallest_type(len(tokenizer)), [], 0
    for piece in _checked(texts, split, tokenizer):
        ids.append(encode(tokenizer, piece).astype(kind))
        units += len(piece) if tokenization_of(tokenizer) == "byte" else len(piece.decode())
    return (np.concatenate(ids) if ids else np.empty(0, kind)), units


def _tokenizer(texts: Texts, kind: str, vocab_size: int, alphabet: str | None) -> Any:
    if kind == "character":
        if alphabet is None:
            found: set[str] = set()
            for piece in _checked(texts, "all", None):
                found.update(piece.decode())
            return character_tokenizer(found)
        return character_tokenizer(alphabet)
    if kind == "byte":
        return byte_tokenizer()
    if kind == "bpe":
        return bpe_tokenizer((piece.decode() for piece in _checked(texts, "train", None)), vocab_size)
    raise ValueError(f"tokenizer must be 'character', 'byte', 'bpe' or a tokenizer; got {kind!r}")


def _checked(texts: Texts, split: str, tokenizer: Any) -> Iterator[bytes]:
    """The pieces of a split; ValueError where one is no UTF-8 and its tokens are not bytes."""
    for part in texts.parts(split):
        place = part.start
        for piece in part.pieces():
            if tokenizer is None or tokenization_of(tokenizer) != "byte":
                try:
                    piece.decode()
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{part.path} is no text in UTF-8 (byte {place + error.start:,}): convert it, or read it with "
                        f"the tokenizer 'byte'"
                    ) from error
            yield piece
            place += len(piece)


def _source(part: Part) -> dict[str, Any]:
    status = part.path.stat()
    changed = {"size": status.st_size, "modified": status.st_mtime_ns}
    return {"path": part.path.absolute().as_posix(), "start": part.start, "end": part.end} | changed


def _digest(texts: Texts, split: str) -> str:
    digest = hashlib.sha256()
    for piece in texts.pieces(split):
        digest.update(piece)
    return digest.hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """A fingerprint of a tokenizer: of all that decides its ids."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described = {name: part for name, part in described.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _smallest_type(vocabulary: int) -> Any:
    return np.uint8 if vocabulary <= 1 << 8 else np.uint16 if vocabulary <= 1 << 16 else np.uint32
