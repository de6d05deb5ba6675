"""A training schedule in phases: short rows and small windows first, and what it will cost.

Source: Longformer, arXiv 2004.05150, section 4.2 and appendix B: from phase to phase windows and rows double and the
learning rate halves; the optimizer's state goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from longspan.attention import Pattern
from longspan.attention.patterns import Full

SAMPLED_QUERIES = 64


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run. length: tokens a row. batch: rows a step.

    windows: keys that a token of each layer sees before itself, from the bottom to the top; None leaves the model's.
    learning_rate: after `warmup_steps` that rise from 0; from there it goes in a line to `final_learning_rate`, or
    stays where that is None.
    """

    steps: int
    length: int
    batch: int
    learning_rate: float
    final_learning_rate: float | None = None
    warmup_steps: int = 0
    windows: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a phase must be at least 1; got {getattr(self, name)}")
        if self.length < 2:
            raise ValueError(
                f"length of a phase must be at least 2 tokens, one to see and one to say; got {self.length}"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate of a phase must be greater than 0; got {self.learning_rate}")
        if self.final_learning_rate is not None and not self.final_learning_rate >= 0:
            raise ValueError(f"final_learning_rate of a phase must not be negative; got {self.final_learning_rate}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warmup_steps of a phase must lie between 0 and its {self.steps} steps; got {self.warmup_steps}"
            )
        if self.windows is not None:
            object.__setattr__(self, "windows", tuple(self.windows))
            if not self.windows or min(self.windows) < 0:
                raise ValueError(
                    f"windows of a phase must be one number of keys a layer, none below 0; got {self.windows}"
                )

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from the phase's beginning."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        if self.final_learning_rate is None:
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate + (self.final_learning_rate - self.learning_rate) * min(1.0, progress)


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Phases, one after another. The schedule is this data and nothing else."""

    phases: tuple[Phase, ...]

    def __post_init__(self):
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases:
            raise ValueError("a curriculum has at least one phase")
        layers = {len(phase.windows) for phase in self.phases if phase.windows is not None}
        if len(layers) > 1:
            raise ValueError(f"all phases must give windows for the same number of layers; got {sorted(layers)}")

    @classmethod
    def of_dicts(cls, phases: Sequence[Mapping[str, Any]]) -> Curriculum:
        """What `dataclasses.asdict` made of the phases."""
        return cls(phases=tuple(Phase(**phase) for phase in phases))

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def tokens(self) -> int:
        return sum(phase.tokens for phase in self.phases)

    def at(self, step: int) -> tuple[int, Phase, int]:
        """(number of the phase, the phase, the step within it) of a step of the run; the last phase goes on forever."""
        for number, phase in enumerate(self.phases):
            if step < phase.steps or number == len(self.phases) - 1:
                return number, phase, step
            step -= phase.steps
        raise AssertionError("there is at least one phase")

    def rate(self, step: int) -> float:
        _, phase, step = self.at(step)
        return phase.rate(step)

    def in_steps(self, steps: int) -> Curriculum:
        """The same phases in so many steps altogether, each with its share of them."""
        if steps < len(self.phases):
            raise ValueError(f"{len(self.phases)} phases need at least as many steps; got {steps}")
        edges, seen = [0], 0
        for number, phase in enumerate(self.phases):
            seen += phase.steps
            left = len(self.phases) - number - 1
            edges.append(min(max(round(seen / self.steps * steps), edges[-1] + 1), steps - left))
        phases = []
        for phase, first, last in zip(self.phases, edges, edges[1:], strict=False):
            warmup = min(round(phase.warmup_steps / phase.steps * (last - first)), last - first)
            phases.append(replace(phase, steps=last - first, warmup_steps=warmup))
        return Curriculum(phases=tuple(phases))

    def table(self, model: nn.Module) -> list[dict[str, Any]]:
        """A row for each phase: what it does, its tokens, and the operations that training on them takes.

        A multiplication and an addition are two operations; the way back takes twice as many as the way there.
        """
        rows, before = [], None
        for number, phase in enumerate(self.phases):
            if phase.windows is not None:
                before = before or tuple(getattr(model.config, "windows", ()))
                set_windows(model, phase.windows)
            rows.append(
                {
                    "phase": number + 1,
                    "steps": phase.steps,
                    "length": phase.length,
                    "batch": phase.batch,
                    "windows": phase.windows,
                    "learning_rate": phase.learning_rate,
                    "tokens": phase.tokens,
                    "operations": 3 * phase.tokens * forward_operations(model, phase.length),
                }
            )
        if before is not None:
            set_windows(model, before)
        return rows


def set_windows(model: Any, windows: tuple[int, ...]) -> None:
    """Gives a model's layers other windows, in place. ValueError for a model whose attention has none to set."""
    if not hasattr(model, "set_windows"):
        raise ValueError(f"the curriculum sets windows, and {type(model).__name__} has none that can be set")
    model.set_windows(windows)


def forward_operations(model: Any, length: int) -> float:
    """Multiplications and additions of a forward pass for each token of a row of `length`: products of weights and
    activations, of queries and keys, and of probabilities and values."""
    weights = {
        id(part): part.weight.numel()
        for part in model.modules()
        if isinstance(getattr(part, "weight", None), torch.Tensor)
        and part.weight.ndim == 2
        and not isinstance(part, nn.Embedding)
    }
    config = model.config
    patterns = _patterns(model)
    # What heads are called in the configurations of decoders and encoders; ours follow.
    heads = getattr(config, "num_attention_heads", None) or config.encoder_config.blocks[0].heads
    width = getattr(config, "hidden_size", None) or config.encoder_config.width
    keys = {pattern: visible_keys(pattern, heads, length) for pattern in set(patterns)}
    return 2 * sum(weights.values()) + sum(4 * width * keys[pattern] for pattern in patterns)


def visible_keys(pattern: Pattern, heads: int, length: int) -> float:
    """Keys that a token of a row sees on average, over heads and over tokens at even distances."""
    queries = torch.linspace(0, length - 1, min(SAMPLED_QUERIES, length)).round().long()
    seen = pattern.count(
        torch.zeros(1, dtype=torch.long),
        torch.arange(heads)[:, None, None],
        queries[None, :, None],
        torch.arange(length)[None, None, :],
    )
    return float((seen > 0).expand(heads, len(queries), length).sum() / (heads * len(queries)))


def _patterns(model: Any) -> tuple[Pattern, ...]:
    """What each layer sees."""
    if hasattr(model.config, "patterns"):
        return tuple(model.config.patterns)
    if hasattr(model.config, "encoder_config"):
        return tuple(block.pattern for block in model.config.encoder_config.blocks)
    return (Full(causal=True),) * model.config.num_hidden_layers
