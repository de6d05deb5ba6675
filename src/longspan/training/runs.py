"""The folder of a training run: which checkpoint to go on from, and whether it is the same run.

A run that is killed and started again with the same arguments ends with the same result, so its folder remembers them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

Features = Sequence[dict[str, Any]]

STEPS_SORTED_TOGETHER = 64


def newest_checkpoint(output: Path, processes: int | None = 1) -> Path | None:
    """The newest checkpoint of the Trainer that is whole: it writes trainer_state.json last, a killed run a torso.

    processes: each of several leaves the state of its random numbers beside it. None: of a run that needs none of them.
    """
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes or 0)]
    whole = []
    for state in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json"):
        try:
            json.loads(state.read_text())
        except ValueError:  # killed in the middle of this very file
            continue
        if all((state.parent / name).is_file() for name in random_states):
            whole.append(state.parent)
    return max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def tensorboard(output: Path, newest: Path | None) -> TensorBoardCallback:
    """Writes to output/tensorboard; what a killed run logged after its last checkpoint is dropped from the curves."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("training writes curves for TensorBoard: pip install longspan[train]") from error
    step = None if newest is None else int(newest.name.split("-")[1]) + 1
    return TensorBoardCallback(SummaryWriter(str(output / "tensorboard"), purge_step=step))


def fingerprint(*lists: Iterable[dict[str, Any]]) -> str:
    """The same for the same rows in the same order."""
    digest = hashlib.sha256()
    for features in lists:
        digest.update(b"rows")
        for row in features:
            for name in sorted(row):
                digest.update(name.encode() + np.asarray(row[name], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def in_order(features: Features, steps: int, batch: int, rows_a_step: int, seed: int) -> list[dict[str, Any]]:
    """The rows of a whole run, steps * rows_a_step of them, one after another: read them with a sequential sampler.

    Every row comes once before any comes again. Within 64 steps of a pass rows are sorted by length, so that a batch
    pads little, and the steps drawn anew. Decided by the seed alone: the run can stop and go on anywhere.
    """
    if rows_a_step % batch:
        raise ValueError(f"a step has whole batches; {rows_a_step} rows make none of {batch}")
    rng = np.random.default_rng(seed)
    needed = steps * rows_a_step
    count = len(features)
    passes = -(-needed // count)
    order = np.concatenate([rng.permutation(count) for _ in range(passes)])[:needed].reshape(steps, rows_a_step)
    lengths = np.array([len(row["input_ids"]) for row in features])
    for number in range(passes):
        # A step that two passes share stays as it is: sorted, it would hold the same row twice.
        first, end = -(-number * count // rows_a_step), min(steps, (number + 1) * count // rows_a_step)
        for start in range(first, end, STEPS_SORTED_TOGETHER):
            part = order[start : min(start + STEPS_SORTED_TOGETHER, end)]
            rows = part.ravel()
            by_length = rows[np.argsort(-lengths[rows], kind="stable")].reshape(part.shape)
            part[:] = by_length[rng.permutation(len(part))]
    return [features[place] for place in order.ravel().tolist()]
