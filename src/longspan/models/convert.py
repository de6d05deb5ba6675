"""A model of 512 tokens made long: window attention, global projections, and positions for any length.

Source: Longformer, arXiv 2004.05150, section 5. Its notebook leaves the rows below RoBERTa's position offset
uninitialized, one of which padding reads, and stops at lengths that are no multiple of 512; here both work.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, LongformerConfig, PreTrainedModel
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from longspan.attention import Pattern, SlidingWindow
from longspan.models import heads
from longspan.models.checkpoints import from_hugging_face, to_hugging_face, translate_config
from longspan.models.config import HeadConfig, LongspanConfig
from longspan.models.encoder import Attention
from longspan.models.model import AUTO_CLASSES, LongspanModel, LongspanPreTrainedModel

# Which tokens the heads of a Longformer make global; without them a classifier's first token would read half a window.
_GLOBAL_TOKENS = {
    "sequence_classification": "first",
    "question_answering": "before_separator",
    "multiple_choice": "after_separator",
}
_HEAD_NAMES = {"PreTraining": "MaskedLM"}  # BERT's two pretraining heads: the one for next sentences stays behind


def to_long(
    model: PreTrainedModel | str | Path, *, max_tokens: int | None = 4096, window: int | Sequence[int] = 512
) -> Any:
    """A long copy of a model, as ours, with the same head: a Longformer that reads `max_tokens` tokens.

    model: BERT, RoBERTa or DistilBERT, of transformers or ours, with any head or none; or the directory or hub name of
    one. A Longformer gets new windows and positions and keeps its global projections.
    max_tokens: any number. The rows of the position table after the family's offset are copied again and again, the
    last copy cut to fit; None keeps the short table and takes positions modulo its length, so no input is too long.
    window: tokens that a token sees around itself, both sides together, without itself; even; or one for each layer.

    Where half the window covers the input, outputs are the original's. Beyond, train it on long texts before you rely
    on it; after masked language modeling call `recopy_global_projections`.
    Raises ValueError for lengths and windows that make no sense and for models without a position table (ModernBERT
    reads any length as it is), NotImplementedError for other families and heads.
    """
    if isinstance(model, str | Path):
        model = load_as_ours(model, load_tokenizer(model))
    kind, config, weights = _as_ours(model)
    prefix = "" if issubclass(kind, LongspanModel) else "longspan."
    _lengthen_positions(config, weights, f"{prefix}embeddings.position.weight", max_tokens)
    _narrow_attention(config, weights, f"{prefix}encoder.blocks.", window)
    for task, tokens in _GLOBAL_TOKENS.items():
        if tokens == "first" or config.sep_token_id is not None:
            config.heads = (config.heads or {}) | {task: config.head_config(task).to_dict() | {"global_tokens": tokens}}
    long: Any = kind(config)
    long.to(device=model.device, dtype=model.dtype)
    long.load_state_dict(weights)  # copies, so the two models share no memory
    return long.train(model.training)


def _lengthen_positions(config: LongspanConfig, weights: dict[str, Tensor], name: str, max_tokens: int | None) -> None:
    embeddings = config.embeddings_config
    if not embeddings.positions:
        raise ValueError(
            f"this {config.family} model has no position table to lengthen: its positions are rotary and it reads any "
            f"length as it is"
        )
    offset = embeddings.position_offset
    period = embeddings.position_period or embeddings.positions - offset
    if max_tokens is None:
        config.embeddings = embeddings.to_dict() | {"position_period": period}
        return
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, or None for no limit; got {max_tokens}")
    rows = weights[name]
    repeated = rows[offset:][torch.arange(max_tokens, device=rows.device) % period]
    weights[name] = torch.cat((rows[:offset], repeated))  # rows below the offset too: padding reads one of them
    config.embeddings = embeddings.to_dict() | {"position_period": None, "positions": offset + max_tokens}


def _narrow_attention(
    config: LongspanConfig, weights: dict[str, Tensor], prefix: str, window: int | Sequence[int]
) -> None:
    blocks = config.encoder_config.blocks
    totals = [window] * len(blocks) if isinstance(window, int) else list(window)
    if len(totals) != len(blocks) or any(total < 2 or total % 2 for total in totals):
        raise ValueError(
            f"window must be an even number of tokens >= 2, both sides together, or one for each of the "
            f"{len(blocks)} layers; got {window}"
        )
    for layer, block in enumerate(blocks):
        qkv = f"{prefix}{layer}.attention.qkv"
        for part in ("weight", "bias"):
            if not block.global_projections and f"{qkv}.{part}" in weights:
                weights[f"{qkv}_global.{part}"] = weights[f"{qkv}.{part}"]
    long_blocks = (
        replace(block, pattern=SlidingWindow(total // 2, total // 2), global_projections=True)
        for block, total in zip(blocks, totals, strict=True)
    )
    config.encoder = replace(config.encoder_config, blocks=tuple(long_blocks)).to_dict()


def recopy_global_projections(model: nn.Module) -> None:
    """Makes the global projections of every layer equal to its local ones, in place.

    For after masked language modeling, which has no global tokens and so trains the local projections only.
    Raises ValueError when no layer has global projections.
    """
    copied = False
    for attention in model.modules():
        if isinstance(attention, Attention) and attention.qkv_global is not None:
            attention.qkv_global.load_state_dict(attention.qkv.state_dict())
            copied = True
    if not copied:
        raise ValueError(f"{type(model).__name__} has no global projections: make it long with longspan.to_long()")


def to_hugging_face_longformer(model: LongspanPreTrainedModel) -> PreTrainedModel:
    """The same model as transformers' own Longformer, of the same head; what that saves is a stock checkpoint.

    model: what `to_long` returns for a RoBERTa, a BERT or a DistilBERT. Outputs are equal, in eval mode. Longformer
    numbers tokens and skips padding, and the position table is shifted to it: BERT and DistilBERT, which number padding
    too, agree where padding stands on the right. Dropout follows Longformer's rules, which differ in places.
    Raises NotImplementedError, naming what differs, for what a Longformer cannot express: positions without a limit,
    heads of its own (DistilBERT's classifiers), layers of unequal shape, full attention.
    """
    config, task = model.config, model.task
    embeddings, encoder, first = config.embeddings_config, config.encoder_config, config.encoder_config.blocks[0]
    if task is None and not isinstance(model, LongspanModel):
        raise NotImplementedError(f"transformers' Longformer has no head like that of {type(model).__name__}")
    if embeddings.max_tokens is None or embeddings.padding_idx is None:
        raise NotImplementedError(
            "transformers' Longformer needs a padding id and a position table with an end: convert with max_tokens=N"
        )
    options: dict[str, Any] = {
        name: value
        for name in ("bos_token_id", "eos_token_id", "sep_token_id", "id2label", "label2id", "problem_type")
        if (value := getattr(config, name, None)) is not None
    }
    hf_config = LongformerConfig(
        vocab_size=embeddings.vocab_size,
        hidden_size=encoder.width,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=first.heads,
        intermediate_size=first.ffn_width,
        hidden_act=encoder.activation,
        hidden_dropout_prob=encoder.dropout,
        attention_probs_dropout_prob=encoder.attention_dropout,
        max_position_embeddings=embeddings.padding_idx + 1 + embeddings.max_tokens,
        type_vocab_size=max(1, embeddings.type_vocab_size),
        layer_norm_eps=encoder.norm_eps,
        pad_token_id=embeddings.padding_idx,
        attention_window=[2 * _side(block.pattern) for block in encoder.blocks],
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        **options,
    )
    head = None if task is None else config.head_config(task)
    weights = dict(model.state_dict())
    if head is not None and head.pooling == "pooler" and task == "sequence_classification":
        head = replace(head, pooling="first", activation="tanh")  # the same layers under Longformer's names
        weights = {name.replace("longspan.pooler.", "head."): value for name, value in weights.items()}
    _refuse_differences(config, head, translate_config(hf_config), task)

    prefix = "" if task is None else "longspan."
    positions = weights[f"{prefix}embeddings.position.weight"][embeddings.position_offset :]
    padding = weights[f"{prefix}embeddings.position.weight"][: embeddings.padding_idx + 1]
    if not embeddings.positions_skip_padding:
        padding = positions.new_zeros(embeddings.padding_idx + 1, encoder.width)
    weights[f"{prefix}embeddings.position.weight"] = torch.cat((padding, positions))
    weights.setdefault(f"{prefix}embeddings.token_type.weight", positions.new_zeros(1, encoder.width))
    has_pooler = f"{prefix}pooler.dense.weight" in weights
    long = AUTO_CLASSES[task].from_config(hf_config, **({} if task or has_pooler else {"add_pooling_layer": False}))
    long.load_state_dict(to_hugging_face(weights, translate_config(hf_config), task))
    return long.to(device=model.device, dtype=model.dtype).train(model.training)


def _side(pattern: Pattern) -> int:
    if not isinstance(pattern, SlidingWindow) or pattern != SlidingWindow(pattern.before, pattern.before):
        raise NotImplementedError(
            f"transformers' Longformer has windows with two equal sides and no gaps in all layers; got {pattern}"
        )
    return pattern.before


def _refuse_differences(ours: LongspanConfig, head: HeadConfig | None, stock: LongspanConfig, task: str | None) -> None:
    """NotImplementedError when `stock`, the model after a trip through a Longformer's configuration, is another."""
    pairs = {"encoder": (ours.encoder_config.to_dict(), stock.encoder_config.to_dict())}
    if task is not None and head is not None:
        pairs["head"] = (head.to_dict(), stock.head_config(task).to_dict())
    differences = [
        f"{what} {name}: {mine[name]!r}, Longformer's {theirs[name]!r}"
        for what, (mine, theirs) in pairs.items()
        for name in mine
        if mine[name] != theirs[name] and "dropout" not in name and name != "global_tokens"
    ]
    if differences:
        raise NotImplementedError(f"transformers' Longformer cannot express this model: {'; '.join(differences)}")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert_checkpoint` wrote. Lengths and windows in tokens; max_tokens None = no limit."""

    source: str
    out: Path
    architecture: str
    trained_tokens: int | None
    max_tokens: int | None
    windows: tuple[int, ...]
    parameters: int
    has_tokenizer: bool


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    max_tokens: int | None = 4096,
    window: int | Sequence[int] = 512,
    format: Literal["longspan", "huggingface"] = "longspan",
) -> Conversion:
    """Writes the long copy of a checkpoint and its tokenizer to the directory `out`, whole or not at all.

    source: directory or hub name. max_tokens, window: as `to_long` takes them; the tokenizer's limit follows.
    format: "longspan", or "huggingface" for transformers' own Longformer (see `to_hugging_face_longformer`).
    Raises FileExistsError when `out` is a file or a directory that holds something, and what `to_long` raises.
    """
    out = Path(out)
    refuse_existing(out)
    if format not in ("longspan", "huggingface"):
        raise ValueError(f"format must be 'longspan' or 'huggingface'; got {format!r}")
    tokenizer = load_tokenizer(source)
    long = to_long(load_as_ours(source, tokenizer), max_tokens=max_tokens, window=window)
    written = to_hugging_face_longformer(long) if format == "huggingface" else long
    if tokenizer is not None:
        tokenizer.model_max_length = VERY_LARGE_INTEGER if max_tokens is None else max_tokens
        if tokenizer.is_fast:  # tokenizer.json may carry the old length for those who read it without transformers
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
    with whole_or_absent(out) as folder:
        written.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Conversion(
        source=str(source),
        out=out,
        architecture=type(written).__name__,
        trained_tokens=long.config.trained_tokens,
        max_tokens=max_tokens,
        windows=tuple(2 * _side(block.pattern) for block in long.config.encoder_config.blocks),
        parameters=written.num_parameters(),
        has_tokenizer=tokenizer is not None,
    )


def refuse_existing(out: Path) -> None:
    """FileExistsError when `out` is a file or a directory that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty directory: name another, or remove it first")


@contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `out` at the end, or nothing at all after an error."""
    out = out.absolute()
    folder = out.with_name(f".{out.name}.{os.getpid()}.partial")  # beside it, so that renaming copies nothing
    folder.mkdir(parents=True)
    try:
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_as_ours(source: str | Path, tokenizer: Any = None) -> LongspanPreTrainedModel:
    """The checkpoint as ours, with the head that its configuration names."""
    config = AutoConfig.from_pretrained(source)
    kind: Any = _class_for((config.architectures or ["Model"])[0])
    model = kind.from_pretrained(source)
    if tokenizer is not None and model.config.sep_token_id is None:
        model.config.sep_token_id = tokenizer.sep_token_id
    return model


def load_tokenizer(source: str | Path) -> Any:
    """The checkpoint's tokenizer, or None where it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):
        return None
    # Without tokenizer files transformers makes one up that knows its special tokens only.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


def as_ours(model: PreTrainedModel) -> Any:
    """The model itself if it is ours, else a copy of it as ours, with the same head.

    Raises NotImplementedError for other families and heads.
    """
    if isinstance(model, LongspanPreTrainedModel):
        return model
    kind, config, weights = _as_ours(model)
    ours: Any = kind(config)
    ours.to(device=model.device, dtype=model.dtype)
    ours.load_state_dict(weights)
    return ours.train(model.training)


def _as_ours(model: PreTrainedModel) -> tuple[type[LongspanPreTrainedModel], LongspanConfig, dict[str, Tensor]]:
    """Our class for this model, its configuration and its weights, under our names; the model is left alone."""
    if isinstance(model, LongspanPreTrainedModel):
        return type(model), copy.deepcopy(model.config), dict(model.state_dict())
    config, kind = translate_config(model.config), _class_for(type(model).__name__)
    weights = from_hugging_face(dict(model.state_dict()), config, kind.task)
    if kind is LongspanModel:
        config.pooler = "pooler.dense.weight" in weights
    return kind, config, weights


def _class_for(architecture: str) -> type[LongspanPreTrainedModel]:
    """Our class for "BertForMaskedLM", "RobertaModel" and the like."""
    _, _, head = architecture.partition("For")
    name = f"LongspanFor{_HEAD_NAMES.get(head, head)}" if head else "LongspanModel"
    kind = getattr(heads, name, None)
    if kind is None:
        known = sorted(name.removeprefix("LongspanFor") for name in vars(heads) if name.startswith("LongspanFor"))
        raise NotImplementedError(f"{architecture} has a head that longspan lacks; the heads are {', '.join(known)}")
    return kind
