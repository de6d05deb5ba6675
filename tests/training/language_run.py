"""A tiny run of `train_language_model`, in a process of its own where it is to be killed.

python -m tests.training.language_run OUTPUT TOKENS [KILL_AT_STEP]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.models.longformer_lm import LongformerForCausalLM, LongformerLMConfig
from longspan.training.curriculum import Curriculum, Phase
from longspan.training.language import LanguageTraining, TrainedLanguageModel, train_language_model
from longspan.training.language_trainer import LanguageTrainer
from longspan.training.texts import find_texts
from longspan.training.token_files import TokenFiles, load_token_files, make_token_files

CURRICULUM = Curriculum(
    phases=(
        Phase(steps=8, length=16, batch=4, learning_rate=1e-2, warmup_steps=3, windows=(2, 4)),
        Phase(steps=4, length=32, batch=2, learning_rate=5e-3, final_learning_rate=0.0, windows=(4, 8)),
    )
)
SETTINGS: dict[str, Any] = {
    "curriculum": CURRICULUM,
    "accumulate": 2,
    "evaluate_steps": 5,
    "save_steps": 3,
    "log_steps": 2,
    "dev_tokens": 128,
}


def make_tokens(folder: Path, kind: str = "character") -> TokenFiles:
    words = np.random.default_rng(0).choice(["the", "zoo", "river", "is", "old"], 800)
    (folder / "text.txt").write_text(" ".join(words))
    return make_token_files(find_texts(folder / "text.txt"), folder / "tokens", kind, vocab_size=300)


def small_model(vocabulary: int) -> LongformerForCausalLM:
    """Has dropout: a run that goes on must draw the same random numbers."""
    torch.manual_seed(0)
    return LongformerForCausalLM(
        LongformerLMConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            windows=3,
            dropout=0.1,
        )
    )


def run(output: Any, tokens: Any, **changes: Any) -> tuple[TrainedLanguageModel, Any, list[str]]:
    """The finished run, its model and what it told."""
    files = tokens if isinstance(tokens, TokenFiles) else load_token_files(tokens)
    model, told = small_model(len(files.tokenizer)), []
    config = LanguageTraining(output=str(output), **SETTINGS | changes)
    return train_language_model(model, files, config, tell=told.append), model, told


def kill_at(step: int) -> None:
    """From now on a Trainer's process dies before it computes that step, as by kill -9."""
    whole = LanguageTrainer.training_step

    def training_step(self: Any, *inputs: Any, **named: Any) -> Any:
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *inputs, **named)

    LanguageTrainer.training_step = training_step


if __name__ == "__main__":
    if len(sys.argv) > 3:
        kill_at(int(sys.argv[3]))
    print(run(*sys.argv[1:3])[0].bits)
