"""Masked language modeling of a model that was made long, so that it learns to use its new length.

Source: Longformer, arXiv 2004.05150, section 5, and its conversion notebook, whose settings are the defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.distributed.processes import first_process_first, join_processes, lost_processes_told
from longspan.models.convert import load_as_ours, load_tokenizer, recopy_global_projections
from longspan.models.encoder import Attention
from longspan.models.heads import LongspanForMaskedLM
from longspan.training.curriculum import Curriculum, Phase
from longspan.training.language import LanguageTraining, TrainedLanguageModel, train_language_model
from longspan.training.texts import find_texts
from longspan.training.token_files import make_token_files
from longspan.training.token_rows import hidden_tokens

LONGEST_ROW = 4096


@dataclass(frozen=True, kw_only=True)
class MaskedTraining:
    """Everything that decides the run.

    source: directory or hub name of a masked language model; output, data, tokens: as `longspan train lm` has them.
    length: tokens of a row, with the two that open and close it; None for what the model reads, at most 4,096.
    batch: rows a step, computed in `accumulate` batches. warmup_steps: None for 500, at most a tenth of the steps.
    masked: the share of tokens that is hidden.
    sequence_parallel, shard_weights, timeout_seconds: as in `LanguageTraining`.
    """

    source: str
    data: str
    output: str
    tokens: str | None = None
    length: int | None = None
    steps: int = 3000
    batch: int = 64
    accumulate: int = 32
    learning_rate: float = 3e-5
    warmup_steps: int | None = None
    masked: float = 0.15
    evaluate_steps: int = 500
    save_steps: int = 200
    log_steps: int = 20
    bf16: bool | None = None
    sequence_parallel: int = 1
    shard_weights: bool = False
    timeout_seconds: int = 60
    seed: int = 0


def train_masked(config: MaskedTraining, *, tell: Callable[[str], None] = lambda line: None) -> TrainedLanguageModel:
    """Trains, or goes on with, the run; bits are those of a hidden token of the dev split.

    Masked language modeling has no global tokens, so the projections for these are copied again from the local ones
    when it is over. Raises ValueError for a model of another kind and rows longer than it reads.
    """
    tokenizer = load_tokenizer(config.source)
    if tokenizer is None:
        raise ValueError(f"{config.source} has no tokenizer, so no text can be read for it")
    model: Any = load_as_ours(config.source, tokenizer)
    if not isinstance(model, LongspanForMaskedLM):
        raise ValueError(
            f"{config.source} is a {type(model).__name__}: masked language modeling needs the head that says the "
            f"hidden tokens. Convert a checkpoint that has one (an architecture that ends in ForMaskedLM)"
        )
    most = model.config.embeddings_config.max_tokens
    length = config.length or min(most or LONGEST_ROW, LONGEST_ROW)
    if most is not None and length > most:
        raise ValueError(
            f"length is {length:,} and {config.source} reads {most:,} tokens: choose a shorter one, or make it longer "
            f"with `longspan convert`"
        )
    output = Path(config.output)
    folder = config.tokens or output.with_name(f"{output.name}-tokens")
    join_processes(config.timeout_seconds)
    with lost_processes_told(config.timeout_seconds), first_process_first():
        tokens = make_token_files(find_texts(config.data), folder, tokenizer, tell=tell)
    warmup = min(500, config.steps // 10) if config.warmup_steps is None else config.warmup_steps
    phase = Phase(
        steps=config.steps,
        length=length,
        batch=config.batch,
        learning_rate=config.learning_rate,
        final_learning_rate=0.0,
        warmup_steps=warmup,
    )
    training = LanguageTraining(
        output=config.output,
        curriculum=Curriculum(phases=(phase,)),
        accumulate=config.accumulate,
        betas=(0.9, 0.999),
        epsilon=1e-6,
        max_grad_norm=5.0,
        evaluate_steps=config.evaluate_steps,
        save_steps=config.save_steps,
        log_steps=config.log_steps,
        bf16=config.bf16,
        sequence_parallel=config.sequence_parallel,
        shard_weights=config.shard_weights,
        timeout_seconds=config.timeout_seconds,
        seed=config.seed,
    )
    objective = hidden_tokens(tokenizer, config.masked)
    return train_language_model(model, tokens, training, objective, finish=_recopy, tell=tell)


def _recopy(model: Any) -> None:
    if any(isinstance(part, Attention) and part.qkv_global is not None for part in model.modules()):
        recopy_global_projections(model)
