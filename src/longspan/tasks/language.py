"""How well a language model predicts a text: bits per character over overlapping windows, beside compressors.

n windows, L tokens each.
"""

from __future__ import annotations

import gzip
import inspect
import lzma
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from longspan.inference.evidence import uses_bf16
from longspan.models.convert import load_tokenizer
from longspan.models.text_tokenizers import tokenization_of
from longspan.training.token_files import unit_of

Array = NDArray[Any]

TOKENS_TOGETHER = 32_768
PPM_ORDER, PPM_MEMORY = 8, 256 << 20


def load_language_model(source: str | Path) -> tuple[Any, Any]:
    """A causal language model and its tokenizer. ValueError for a checkpoint of another kind or without a tokenizer."""
    config = AutoConfig.from_pretrained(source)
    architectures = config.architectures or ()
    if architectures and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise ValueError(
            f"{source} holds {', '.join(architectures)}, which is no language model that writes: give one whose class "
            f"ends in ForCausalLM, such as `longspan train lm` makes"
        )
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer beside the model, so its text cannot be read")
    return AutoModelForCausalLM.from_pretrained(source).eval(), tokenizer


@dataclass(frozen=True, kw_only=True)
class LanguageScore:
    """bits: per `unit`, a character or a byte. windows: read, of all_windows. tokens: scored.

    first_window: in words, what became of the tokens of the first window, most of which see less than the others.
    """

    bits: float
    unit: str
    length: int
    stride: int
    windows: int
    all_windows: int
    tokens: int
    first_window: str
    tokens_per_second: float


def bits_per_character(
    model: Any,
    tokenizer: Any,
    tokens: Array,
    *,
    length: int,
    stride: int,
    limit: int | None = None,
    bf16: bool | None = None,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, all: None,
) -> LanguageScore:
    """Mean bits that `model` needs for a character of a text.

    tokens: ids of the text [N]. Windows of `length` tokens follow each other at `stride` tokens, and each scores its
    last `stride` tokens, which so see at least length - stride tokens before them (Longformer, section 4.2). The first
    window scores all of its tokens but the very first; where `limit` windows are drawn (by `seed`) it is left out.
    bf16: None for where the processor has instructions for it. tell: is called with windows done and to do.
    ValueError for a text shorter than one window, a stride that leaves no token to see, and windows longer than the
    model reads.
    """
    if not 0 < stride < length:
        raise ValueError(f"stride must be at least 1 and smaller than length, {length:,}; got {stride:,}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 window; got {limit}")
    if len(tokens) < length:
        raise ValueError(
            f"the text has {len(tokens):,} tokens, less than one window of {length:,}: give more text, or a length of "
            f"at most {len(tokens):,}"
        )
    _refuse_longer_than_read(model, length)
    ends = np.arange(length, len(tokens) + stride, stride).clip(max=len(tokens))
    scored = np.diff(ends, prepend=1)  # the first window's all but the very first, the last one's what is left
    drawn = np.arange(len(ends))
    about = "the first window scores all its tokens but the very first, so these see fewer tokens than the others"
    if limit is not None and limit < len(ends):
        if len(ends) == 1:
            raise ValueError("there is one window only, and nothing to draw: leave out the limit")
        drawn = np.sort(np.random.default_rng(seed).permutation(np.arange(1, len(ends)))[:limit])
        about = "the first window, whose tokens see fewer than the others, is not scored"
    began = time.perf_counter()
    bits = units = 0.0
    for place, numbers in enumerate(_alike(scored, drawn)):
        count = int(scored[numbers[0]])
        found = bits_of_windows(model, tokens, ends[numbers], length=length, scored=count, bf16=bf16)
        bits += float(found.sum())
        units += sum(_units(tokenizer, tokens[end - count : end]) for end in ends[numbers])
        tell(place + 1, len(drawn))
    return LanguageScore(
        bits=bits / units,
        unit=unit_of(tokenizer),
        length=length,
        stride=stride,
        windows=len(drawn),
        all_windows=len(ends),
        tokens=int(scored[drawn].sum()),
        first_window=about,
        tokens_per_second=len(drawn) * length / (time.perf_counter() - began),
    )


def bits_of_windows(
    model: Any, tokens: Array, ends: Array | Sequence[int], *, length: int, scored: int, bf16: bool | None = None
) -> NDArray[np.float64]:
    """Bits that the last `scored` tokens of windows take, all together for each window. [n]

    ends: where the windows end in `tokens`; each begins `length` tokens before.
    """
    ends, rows = np.asarray(ends), max(1, TOKENS_TOGETHER // length)
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": scored + 1}
    options = {name: value for name, value in options.items() if name in accepted}
    found = []
    with _evaluating(model), torch.autocast(model.device.type, torch.bfloat16, enabled=uses_bf16(bf16, model.device)):
        for first in range(0, len(ends), rows):
            ids = np.stack([tokens[end - length : end] for end in ends[first : first + rows]]).astype(np.int64)
            ids = torch.from_numpy(ids).to(model.device)
            logits = model(input_ids=ids, **options).logits[:, -scored - 1 : -1].float()
            nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, -scored:], reduction="none")
            found.append(nats.double().sum(1).cpu().numpy() / np.log(2))
    return np.concatenate(found)


@dataclass(frozen=True, kw_only=True)
class Compressor:
    """What a compressor makes of the same text. bits: per character; None where it is not installed: see note."""

    name: str
    bits: float | None
    note: str = ""


def compressors(text: bytes, *, units: int, primer: bytes | None = None) -> list[Compressor]:
    """gzip, xz and PPMd at their best settings, on a text of `units` characters.

    They begin with empty memories, where a model has learnt from other text; so with a `primer`, such text, there is a
    row for PPMd after it has read that: what the text adds to the compressed primer.
    """

    def bits(compressed: bytes) -> float:
        return 8 * len(compressed) / units

    rows = [
        Compressor(name="gzip -9", bits=bits(gzip.compress(text, 9))),
        Compressor(name="xz -9e", bits=bits(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))),
    ]
    name = f"PPMd, order {PPM_ORDER}"
    try:
        import pyppmd
    except ImportError:
        return [*rows, Compressor(name=name, bits=None, note="pip install longspan[evaluate]")]

    def ppm(data: bytes, memory: int) -> int:
        encoder = pyppmd.Ppmd7Encoder(PPM_ORDER, memory)
        size = sum(len(encoder.encode(data[start : start + (1 << 24)])) for start in range(0, len(data), 1 << 24))
        return size + len(encoder.flush())

    rows.append(Compressor(name=name, bits=8 * ppm(text, PPM_MEMORY) / units))
    if primer:
        memory = 2 * PPM_MEMORY
        added = ppm(primer + text, memory) - ppm(primer, memory)
        note = f"after {len(primer) / 1e6:,.1f} MB of training text"
        rows.append(Compressor(name=f"{name}, {note}", bits=8 * added / units))
    return rows


def _alike(scored: Array, drawn: Array) -> list[Array]:
    """The numbers of windows in groups that score as many tokens and are computed together."""
    groups: list[list[int]] = []
    for number in drawn:
        if groups and scored[groups[-1][-1]] == scored[number] and len(groups[-1]) < 64:
            groups[-1].append(int(number))
        else:
            groups.append([int(number)])
    return [np.array(group) for group in groups]


def _units(tokenizer: Any, ids: Array) -> int:
    if tokenization_of(tokenizer) in ("character", "byte"):
        return len(ids)
    return len(tokenizer.decode(ids.tolist()))


def _refuse_longer_than_read(model: Any, length: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ValueError(
            f"{type(model).__name__} reads rows of at most {most:,} tokens; got a length of {length:,}: choose a "
            f"shorter one"
        )


@contextmanager
def _evaluating(model: Any):
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
