"""Text that a language model writes after a prompt, handed over as it is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from transformers.generation.streamers import BaseStreamer

from longspan.models.text_tokenizers import encode


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. temperature: 0 takes the likeliest. top_k, top_p: only the likeliest so many, or the
    likeliest that together have this probability; None for all."""

    max_new_tokens: int = 500
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or greater; got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be greater than 0 and at most 1; got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """text: without the prompt. tokens: of it. seconds: with reading the prompt."""

    text: str
    tokens: int
    seconds: float


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    sampling: Sampling | None = None,
    *,
    write: Callable[[str], None] = lambda text: None,
) -> Generated:
    """What the model writes after `prompt`.

    write: is called with every piece of text as soon as it is whole characters.
    ValueError for an empty prompt, characters outside the model's alphabet, and more tokens than the model reads.
    """
    sampling = sampling or Sampling()
    ids = np.asarray(encode(tokenizer, prompt), np.int64)
    if not len(ids):
        raise ValueError("the prompt is empty: give at least one character to go on from")
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and len(ids) + sampling.max_new_tokens > most:
        raise ValueError(
            f"the prompt has {len(ids):,} tokens, and with {sampling.max_new_tokens:,} new ones that is more than the "
            f"{most:,} that {type(model).__name__} reads: ask for at most {max(0, most - len(ids)):,}"
        )
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        }
    streamer = _Streamer(tokenizer, write)
    began = time.perf_counter()
    was_training = model.training
    model.eval()
    device = model.device
    with torch.inference_mode(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        inputs = torch.from_numpy(ids)[None].to(device)
        found = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=sampling.max_new_tokens,
            streamer=streamer,
            **options,
        )
    model.train(was_training)
    return Generated(text=streamer.text, tokens=found.shape[1] - len(ids), seconds=time.perf_counter() - began)


class _Streamer(BaseStreamer):
    """Decodes token by token; a character of several tokens is written when its last one has come."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self.backend, self.write = tokenizer.backend_tokenizer, write
        self.stream = DecodeStream(skip_special_tokens=True)
        self.text, self.prompted = "", False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompted:  # generate() begins with the prompt
            self.prompted = True
            return
        for number in value.flatten().tolist():
            piece = self.stream.step(self.backend, number)
            if piece:
                self.text += piece
                self.write(piece)

    def end(self) -> None:
        return
