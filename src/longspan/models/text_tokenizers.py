"""Tokenizers of language models: characters, bytes, or pieces of words that are learnt from the text.

All are transformers' fast tokenizers: saved beside a model, they load with AutoTokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Array = NDArray[Any]
Tokenization = Literal["character", "byte", "bpe"]

TEXT8_ALPHABET = " abcdefghijklmnopqrstuvwxyz"


def character_tokenizer(alphabet: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a character; ids follow the order of code points. It knows no others: see `encode`."""
    characters = sorted(set(alphabet))
    if not characters or any(len(character) != 1 for character in characters):
        raise ValueError(f"an alphabet has one character or more, each of them once; got {characters[:20]}")
    vocabulary = {character: number for number, character in enumerate(characters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=""))  # which stands for nothing: others are an error
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _fast(backend, "character")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8: the id is the byte, and any text can be written."""
    backend = Tokenizer(models.BPE(_byte_names(), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _fast(backend, "byte")


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Pieces of words, learnt from `texts` by byte-level byte-pair encoding (GPT-2's kind): any text can be written.

    vocab_size: tokens at most, 257 or more; a short text gives fewer.
    """
    if vocab_size <= 256:
        raise ValueError(
            f"a BPE vocabulary holds the 256 bytes and at least one piece more; got vocab_size={vocab_size}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return _fast(backend, "bpe")


def tokenization_of(tokenizer: Any) -> str | None:
    """ "character", "byte" or "bpe" for what the functions above made, saved and loaded or not; None for others."""
    return tokenizer.init_kwargs.get("tokenization")


def encode(tokenizer: Any, text: str | bytes) -> Array:
    """Token ids of a text, without special tokens. [n]

    text: bytes are UTF-8, unless the tokenizer is of bytes. ValueError names the characters that a tokenizer of
    characters does not know.
    """
    kind = tokenization_of(tokenizer)
    if kind == "byte":
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)
    text = text.decode() if isinstance(text, bytes) else text
    if kind != "character":
        return np.array(
            tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"], np.int64
        )
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known = _alphabet(tuple(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)))
    ids = np.searchsorted(known, codes).clip(max=len(known) - 1)
    outside = known[ids] != codes
    if outside.any():
        strange, first = np.unique(codes[outside], return_counts=True), int(np.argmax(outside))
        order = np.argsort(-strange[1], kind="stable")
        shown = ", ".join(f"{chr(strange[0][place])!r} ({strange[1][place]:,} times)" for place in order[:10])
        more = f" and {len(order) - 10} other characters" if len(order) > 10 else ""
        alphabet = "".join(map(chr, known))
        raise ValueError(
            f"{int(outside.sum()):,} of {len(codes):,} characters are outside the model's alphabet: {shown}{more}; the "
            f"first is the {first + 1:,}th, near {text[max(0, first - 20) : first + 20]!r}. The alphabet has "
            f"{len(known)} characters, {alphabet[:80]!r}{'...' if len(alphabet) > 80 else ''}: map the text to it"
        )
    return ids


@lru_cache(maxsize=8)
def _alphabet(characters: tuple[str, ...]) -> Array:
    return np.array([ord(character) for character in characters], np.uint32)


def _byte_names() -> dict[str, int]:
    """The characters that stand for bytes in byte-level tokenizers (GPT-2's table): printable ones for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return {names[byte]: byte for byte in range(256)}


def _fast(backend: Tokenizer, kind: Tokenization) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        tokenization=kind,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
