"""A teacher's outputs, computed once and kept on disk, so that every epoch and every student reads them.

Shapes: B batch, N tokens, T tokens of some rows without padding, C model width, L labels.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longspan.compression.readings import LABELS, inputs_of, read, token_mask_of
from longspan.training.runs import fingerprint

Features = Sequence[Mapping[str, Any]]
Collate = Callable[[list[Any]], Mapping[str, Tensor]]
_ROWS_A_SHARD, _SHARDS_OPEN = 256, 64
_TOKENS_ON_CPU = 2048  # read at a time: N x N scores of more leave the cache (MPNet, 512 tokens: 317 ms a row, not 170)
_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "_attn_implementation", "dtype", "torch_dtype")


class TeacherOutputs:
    """What a teacher said about each row, read from a folder that `compute_teacher_outputs` filled.

    names: what there is, as `readings` names it. A shard holds rows of similar length: a value for each row, or the
    values of all tokens one after the other.
    """

    def __init__(self, folder: Path, lengths: Sequence[int], names: Sequence[str]):
        self.folder, self.names = folder, tuple(names)
        self.order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
        self._rank = {row: rank for rank, row in enumerate(self.order)}
        self._shard = lru_cache(_SHARDS_OPEN)(lambda number: _Shard(self.path(number)))

    def __len__(self) -> int:
        return len(self.order)

    def path(self, shard: int) -> Path:
        return self.folder / f"rows-{shard:05d}.safetensors"

    def logits(self) -> Tensor:
        """Of all rows, fp32[n, L], in their order."""
        shards = range((len(self) + _ROWS_A_SHARD - 1) // _ROWS_A_SHARD)
        sorted_rows = torch.cat([self._shard(shard).file.get_tensor("logits") for shard in shards]).float()
        return sorted_rows[[self._rank[row] for row in range(len(self))]]

    def batch(self, rows: Sequence[int], token_mask: Tensor) -> dict[str, Tensor]:
        """The readings of these rows, padded as token_mask Bool[B, N] says; fp32 whatever they are kept in."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for row, tokens in zip(rows, token_mask.sum(1).tolist(), strict=True):
            shard, place = divmod(self._rank[row], _ROWS_A_SHARD)
            held = self._shard(shard)
            start, stop = held.first_token[place : place + 2]
            if stop - start != tokens:
                raise ValueError(
                    f"row {row} has {tokens} tokens and the teacher's outputs in {self.folder} {stop - start}"
                )
            for name, parts in found.items():
                parts.append(held.read(name, place, place + 1)[0] if name == "logits" else held.read(name, start, stop))
        return {
            name: torch.stack(parts).float() if name == "logits" else _spread(torch.cat(parts).float(), token_mask)
            for name, parts in found.items()
        }


class _Shard:
    """An open file of which only what is asked for is read."""

    def __init__(self, path: Path):
        self.file: Any = safe_open(path, "pt")
        self.names = set(self.file.keys()) - {"first_token"}
        self.first_token = self.file.get_tensor("first_token").tolist()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.file.get_slice(name)[start:stop]


def compute_teacher_outputs(
    teacher: nn.Module,
    features: Features,
    folder: str | Path,
    *,
    collate: Collate,
    wanted: Sequence[str] = (),
    batch: int = 32,
    bf16: bool = False,
) -> TeacherOutputs:
    """The teacher's logits for all rows, and the `wanted` readings, computed where the folder does not hold them.

    features: as the teacher's tokenizer gives them, not padded; labels are not looked at. collate: pads a list of them.
    They are kept in a folder of their own, named by a hash of the teacher's weights and configuration, the features
    and `wanted`, in shards of 256 rows that are written whole or not at all: after a kill the rest is computed.
    Logits are kept in fp32, hidden states and projections in bf16. bf16: compute in it, too.
    Raises ValueError for no rows and for a teacher whose outputs are not finite.
    """
    if not len(features):
        raise ValueError("there are no rows for the teacher to read")
    key = hashlib.sha256(
        json.dumps([hash_of_model(teacher), fingerprint(map(without_labels, features)), sorted(wanted), bf16]).encode()
    ).hexdigest()[:24]
    folder = Path(folder) / key
    folder.mkdir(parents=True, exist_ok=True)
    lengths = [len(row["input_ids"]) for row in features]
    outputs = TeacherOutputs(folder, lengths, ())
    shards = range((len(lengths) + _ROWS_A_SHARD - 1) // _ROWS_A_SHARD)
    missing = [shard for shard in shards if not outputs.path(shard).exists()]
    was_training, on_cpu = teacher.training, next(teacher.parameters()).device.type == "cpu"
    teacher.eval()
    for shard in track(missing, "teacher", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        rows = outputs.order[shard * _ROWS_A_SHARD : (shard + 1) * _ROWS_A_SHARD]
        first_token = torch.tensor([0, *np.cumsum([lengths[row] for row in rows]).tolist()])
        parts: dict[str, list[Tensor]] = {}
        while rows:
            fitting = min(batch, max(1, _TOKENS_ON_CPU // max(1, lengths[rows[0]]))) if on_cpu else batch
            some, rows = rows[:fitting], rows[fitting:]
            readings = _read(teacher, [features[row] for row in some], collate, wanted, bf16)
            for name, values in readings.items():
                parts.setdefault(name, []).append(values)
        _write(
            {name: torch.cat(values) for name, values in parts.items()} | {"first_token": first_token},
            outputs.path(shard),
        )
    teacher.train(was_training)
    return TeacherOutputs(folder, lengths, sorted(_Shard(outputs.path(0)).names))


def hash_of_model(model: Any) -> str:
    """A hash of a model's class, configuration and weights."""
    found = hashlib.sha256(type(model).__name__.encode())
    config = {name: value for name, value in model.config.to_dict().items() if name not in _VOLATILE}
    found.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        found.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def without_labels(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in LABELS}


@torch.no_grad()
def _read(
    teacher: nn.Module, rows: Sequence[Mapping[str, Any]], collate: Collate, wanted: Sequence[str], bf16: bool
) -> dict[str, Tensor]:
    """The readings of some rows: logits [B, L], all else without padding [T, ...], on the CPU."""
    batch = inputs_of(collate([without_labels(row) for row in rows]), teacher, labels=False)
    token_mask = token_mask_of(batch)
    with torch.autocast(token_mask.device.type, torch.bfloat16, enabled=bf16):
        readings, _ = read(teacher, batch, wanted)
    if "window_scores" in readings or ("logits" in readings and readings["logits"].ndim != 2):
        raise NotImplementedError(
            "only logits of whole rows, and of answers, are kept on disk: set Distillation(keep='nothing')"
        )
    kept = {}
    for name, values in readings.items():
        kept[name] = (values if name == "logits" else values[token_mask]).cpu()
        kept[name] = kept[name].float() if name.endswith("logits") else kept[name].bfloat16()
        if not kept[name].isfinite().all():
            raise ValueError(f"the teacher gives NaN or infinite {name}: check its weights, or leave out bf16")
    return kept


def _spread(flat: Tensor, token_mask: Tensor) -> Tensor:
    """Values of all tokens [T, ...] -> [B, N, ...] with 0 at padding."""
    spread = flat.new_zeros(*token_mask.shape, *flat.shape[1:])
    spread[token_mask] = flat
    return spread


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
