"""Any encoder over texts of any length: windows in batches of similar lengths.

Shapes: B windows in a batch, N tokens of a window, M windows of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from longspan.errors import CheckpointError, DocumentError, NotFiniteError
from longspan.inference.batching import group_by_length
from longspan.inference.extractive import OVERLAP_TOKENS, TOKENS_PER_BATCH
from longspan.inference.reader import check_directory
from longspan.inference.windows import candidate_windows
from longspan.models.packed import Precision
from longspan.models.plug_in import accelerate

UNLIMITED = 10**9  # transformers writes a number of this order where a tokenizer has no limit


class Window(NamedTuple):
    """input_ids: special tokens around a stretch of text. counted: those of them that no other window counts."""

    input_ids: list[int]
    counted: slice


class LongTexts:
    """Means over texts that may be longer than a model's position table.

    A text is read as the model was trained to, with its special tokens around it. One that does not fit is read in
    windows of as many tokens as fit, each with special tokens around it, that overlap by up to `OVERLAP_TOKENS`. In the
    middle of an overlap counting passes from one window to the next, so that each token counts once, where it sees most
    around it; special tokens before the text count in its first window and those behind it in its last.

    network, tokenizer: of transformers or longspan; the tokenizer a fast one. max_tokens: of a text with its special
    tokens; longer ones are cut. None cuts none.
    Raises ValueError for max_tokens without room for text.
    """

    def __init__(self, network: Any, tokenizer: Any, max_tokens: int | None = None):
        self.network, self.tokenizer = network, tokenizer
        probe = tokenizer("a", return_special_tokens_mask=True)
        inside = [place for place, special in enumerate(probe["special_tokens_mask"]) if not special]
        self.before, self.behind = probe["input_ids"][: inside[0]], probe["input_ids"][inside[-1] + 1 :]
        special = len(self.before) + len(self.behind)
        if max_tokens is not None and max_tokens <= special:
            raise ValueError(f"max_tokens counts {special} special tokens and must be larger; got {max_tokens}")
        limit = window_tokens(network.config, tokenizer)
        self.cut = None if max_tokens is None else max_tokens - special
        self.room = None if limit is None else limit - special
        padding = network.config.pad_token_id
        self.padding = tokenizer.pad_token_id if padding is None else padding

    def means(
        self, texts: list[str], take: Callable[[Any, int, slice], Tensor], output_name: str
    ) -> list[tuple[int, np.ndarray]]:
        """For each text its tokens, without special ones and after cutting, and the mean of what is taken [...].

        take: (a batch's output, row, counted tokens) -> their sum [...], float64.
        Raises DocumentError for a text without tokens, NotFiniteError where the mean is NaN or infinite.
        """
        tokens, windows, owners = [], [], []
        for number, text in enumerate(texts):
            ids = self._token_ids(text)
            tokens.append(len(ids))
            windows += self._windows(ids)
            owners += [number] * (len(windows) - len(owners))
        sums: list[Any] = [0.0] * len(texts)
        counts = [0] * len(texts)
        for place, value in self._taken(windows, take):
            sums[owners[place]] = sums[owners[place]] + value
            counts[owners[place]] += windows[place].counted.stop - windows[place].counted.start
        means = [total.numpy() / count for total, count in zip(sums, counts, strict=True)]
        if not all(np.isfinite(mean).all() for mean in means):
            raise NotFiniteError(output_name)
        return list(zip(tokens, means, strict=True))

    def _token_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, truncation=False, padding=False, verbose=False
        )["input_ids"]
        if not ids:
            raise DocumentError("the document holds no text that this model's tokenizer knows.")
        return ids[: self.cut]

    def _windows(self, ids: list[int]) -> list[Window]:
        room = len(ids) if self.room is None else min(self.room, len(ids))
        overlap = min(OVERLAP_TOKENS, room // 2)
        ranges = candidate_windows(len(ids), room, room - overlap)  # [M, 2]
        turns = ((ranges[1:, 0] + ranges[:-1, 1]) // 2).tolist()
        windows = []
        for (start, end), first, last in zip(ranges.tolist(), [None, *turns], [*turns, None], strict=True):
            inputs = [*self.before, *ids[start:end], *self.behind]
            shift = len(self.before) - start
            windows.append(
                Window(
                    inputs, slice(0 if first is None else first + shift, len(inputs) if last is None else last + shift)
                )
            )
        return windows

    def _taken(self, windows: list[Window], take: Callable[[Any, int, slice], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """(place in `windows`, what is taken of it), batch by batch."""
        lengths = [len(window.input_ids) for window in windows]
        batches = group_by_length(lengths, max_tokens=TOKENS_PER_BATCH)
        if self.padding is None:  # heads of language models look for the padding
            batches = [[place] for batch in batches for place in batch]
        for batch in batches:
            longest = max(lengths[place] for place in batch)
            input_ids = torch.full((len(batch), longest), self.padding or 0)
            attention_mask = torch.zeros_like(input_ids)
            for row, place in enumerate(batch):
                input_ids[row, : lengths[place]] = torch.tensor(windows[place].input_ids)
                attention_mask[row, : lengths[place]] = 1
            output = self.network(input_ids=input_ids, attention_mask=attention_mask)
            for row, place in enumerate(batch):
                yield place, take(output, row, windows[place].counted)


def window_tokens(config: Any, tokenizer: Any) -> int | None:
    """How many tokens a model reads at once: the length of its position table or, for one without, what it was trained
    on; None where neither is known."""
    if config.model_type == "longspan":
        embeddings = config.embeddings_config
        return None if embeddings.position_period else embeddings.max_tokens or config.trained_tokens
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa's relatives keep 2 more rows than they read tokens: 514, 4098. The lengths are multiples of 8.
    limits = (positions and positions - positions % 8, tokenizer.model_max_length)
    return min((limit for limit in limits if limit and limit < UNLIMITED), default=None)


def load_network(model: str, ours: Any, theirs: Any, precision: Precision | None) -> tuple[Any, Any]:
    """The model, packed for inference where longspan has its family and else transformers' own, and its tokenizer.

    ours, theirs: the classes of longspan and transformers. precision: None is that of a packed checkpoint, or fp32.
    Raises CheckpointError for what is no such model, NotImplementedError for a precision that its family cannot have.
    """
    check_directory(model)
    options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
    try:
        config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        is_ours = True
        try:
            network, report = ours.from_pretrained(model, **options)
        except NotImplementedError:
            is_ours = False
            network, report = theirs.from_pretrained(model, **options)
    except ImportError:
        raise
    except Exception as error:  # tokenizers and safetensors raise Exception itself for a damaged file
        raise CheckpointError(f"cannot load model {model}: {str(error).strip().splitlines()[0]}") from error
    unread = "pooler" if theirs is AutoModel else None  # a mean over tokens needs none
    missing = [name for name in sorted(report["missing_keys"]) if unread is None or unread not in name]
    if missing:
        raise CheckpointError(
            f"model {model} is a {' or '.join(config.architectures or ['model'])} and lacks {', '.join(missing[:2])}, "
            f"which would be drawn at random; give a checkpoint of a {theirs.__name__.removeprefix('Auto')}"
        )
    if not tokenizer.is_fast:
        raise CheckpointError(f"model {model} has only a slow tokenizer; give one with a tokenizer.json")
    if is_ours:
        accelerate(network, precision or network.config.precision or "fp32")
    elif precision not in (None, "fp32"):
        raise NotImplementedError(
            f"model {model} is of a family that longspan leaves to transformers, which computes it in fp32; "
            f"leave precision {precision} out."
        )
    return network.eval(), tokenizer
