"""A tiny run of `train_classifier`, in a process of its own where it is to be killed or to have company.

python -m tests.training.classification_run OUTPUT BASE [KILL_AT_STEP]
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from typing import Any

import numpy as np

from longspan.models.classifiers import load_classifier
from longspan.tasks.task import Example, Task, tokenize
from longspan.training import classification
from longspan.training.classification import ClassifierTraining, Trained, train_classifier

SETTINGS = {
    "steps": 12,
    "batch": 4,
    "learning_rate": 2e-2,
    "evaluate_steps": 5,
    "save_steps": 3,
    "log_steps": 2,
    "bf16": True,
}


def task(rows: int = 40) -> Task:
    """Is there "red" or "blue" among other words?"""
    rng = np.random.default_rng(0)

    def examples(split: str, count: int) -> tuple[Example, ...]:
        made = []
        for number in range(count):
            words = list(rng.choice(["the", "zoo", "river", "old"], int(rng.integers(2, 9))))
            words.insert(int(rng.integers(len(words))), ("red", "blue")[number % 2])
            made.append(Example(id=f"{split}-{number}", texts=(" ".join(words),), label=number % 2))
        return tuple(made)

    return Task(name="colors", labels=("red", "blue"), splits={"train": examples("a", rows), "dev": examples("b", 13)})


def run(output: Any, base: Any, **changes: Any) -> tuple[Trained, Any]:
    """The finished run and its model, which has dropout: a resumed run must draw the same random numbers."""
    colors = task()
    loaded = load_classifier(base, colors.labels)
    train, dev = (tokenize(colors.examples(split), loaded.tokenizer) for split in ("train", "dev"))
    config = ClassifierTraining(output=str(output), **SETTINGS | changes)
    done = train_classifier(loaded.model, loaded.tokenizer, train, dev, partial(colors.metrics, "dev"), config)
    return done, loaded.model


def kill_at(step: int) -> None:
    """From now on a Trainer's process dies before it computes that step, as by kill -9."""
    whole, seen = classification.Trainer.training_step, [0]

    def training_step(self: Any, *inputs: Any, **named: Any) -> Any:
        seen[0] += 1
        if seen[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *inputs, **named)

    classification.Trainer.training_step = training_step


if __name__ == "__main__":
    if len(sys.argv) > 3:
        kill_at(int(sys.argv[3]))
    print(run(*sys.argv[1:3])[0])
