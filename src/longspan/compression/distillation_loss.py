"""How far a student is from its teacher: a weighted sum of terms over logits, hidden states and relations.

Shapes: B batch, N tokens, T tokens of the batch without padding, C model width, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Readings = Mapping[str, Tensor]
_WEIGHTS = ("logits", "hard_labels", "hidden_states", "embeddings", "relations")


@dataclass(frozen=True, kw_only=True)
class DistillationLoss:
    """The weight of each term, 0 leaves it out, and what belongs to it. Padding counts in none of them.

    logits: cross entropy of the student's distribution against the teacher's, both at `temperature`, times its square,
        so that the gradient's size does not depend on it (Hinton et al., arXiv 1503.02531, section 2). Start and end
        logits: over the row's tokens; window scores: over its passages. One label (regression): squared error.
    hard_labels: the student's own loss on the examples' labels.
    hidden_states: distance between mapped layers, mean over layers and tokens; through a learned projection where the
        widths differ. hidden_distance: "mse", or "cosine" for 1 - cos.
    embeddings: the same distance between the embeddings' outputs.
    relations: divergence of the softmax of scaled products among queries, among keys and among values, in
        `relation_heads` parts (MiniLMv2, arXiv 2012.15828, section 3.1), mean over mapped layers; N x N memory. Widths
        and numbers of heads may differ.
    layer_map: "uniform" compares every student layer with the teacher's as far up, "last" only the two last, or pairs
        of (student layer, teacher layer) counted from 1.
    """

    logits: float = 1.0
    temperature: float = 2.0
    hard_labels: float = 0.0
    hidden_states: float = 0.0
    hidden_distance: Literal["mse", "cosine"] = "mse"
    embeddings: float = 0.0
    relations: float = 0.0
    relation_heads: int = 12
    layer_map: Literal["uniform", "last"] | tuple[tuple[int, int], ...] = "uniform"

    def __post_init__(self):
        for name in _WEIGHTS:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a weight of 0 or more; got {getattr(self, name)}")
        if not any(getattr(self, name) for name in _WEIGHTS):
            raise ValueError(f"every term has weight 0: set one of {', '.join(_WEIGHTS)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0; got {self.temperature}")
        if self.hidden_distance not in ("mse", "cosine"):
            raise ValueError(f"hidden_distance must be 'mse' or 'cosine'; got {self.hidden_distance!r}")
        if self.relation_heads < 1:
            raise ValueError(f"relation_heads must be at least 1; got {self.relation_heads}")
        if self.layer_map not in ("uniform", "last"):
            if isinstance(self.layer_map, str) or not self.layer_map:
                raise ValueError(
                    f"layer_map must be 'uniform', 'last' or pairs of (student layer, teacher layer); "
                    f"got {self.layer_map!r}"
                )
            object.__setattr__(self, "layer_map", tuple((int(low), int(high)) for low, high in self.layer_map))

    @classmethod
    def fastformers(
        cls, *, state_weight: float = 0.1, hidden_distance: Literal["mse", "cosine"] = "mse"
    ) -> DistillationLoss:
        """FastFormers' loss: soft labels at temperature 1, and embeddings and last layer with weight `state_weight`.

        Here padding does not count and widths may differ. Its attention map term, off by default there, is left out:
        probabilities are never formed; `relations` serves the same end.
        """
        return cls(
            temperature=1.0,
            hidden_states=state_weight,
            embeddings=state_weight,
            hidden_distance=hidden_distance,
            layer_map="last",
        )

    @property
    def needs_tokens(self) -> bool:
        """Whether student and teacher must have split the texts into the same tokens."""
        return bool(self.hidden_states or self.embeddings or self.relations)

    def layers(self, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
        """Pairs of (student layer, teacher layer), counted from 1. ValueError for layers that do not exist."""
        if self.layer_map == "last":
            return ((student, teacher),)
        if self.layer_map == "uniform":
            return tuple(enumerate(uniform_layers(student, teacher), 1))
        for low, high in self.layer_map:
            if not (1 <= low <= student and 1 <= high <= teacher):
                raise ValueError(
                    f"layer_map pairs student layer {low} with teacher layer {high}; the student has layers 1 to "
                    f"{student}, the teacher 1 to {teacher}"
                )
        return self.layer_map

    def wanted(self, pairs: Sequence[tuple[int, int]]) -> tuple[list[str], list[str]]:
        """Names of what to read of the student and of the teacher, besides logits."""
        names: tuple[list[str], list[str]] = ([], [])
        for side, out in enumerate(names):
            if self.embeddings:
                out.append("hidden.0")
            for pair in pairs:
                if self.hidden_states:
                    out.append(f"hidden.{pair[side]}")
                if self.relations:
                    out += [f"{kind}.{pair[side]}" for kind in ("query", "key", "value")]
        return list(dict.fromkeys(names[0])), list(dict.fromkeys(names[1]))

    def projections(self, pairs: Sequence[tuple[int, int]], student_width: int, teacher_width: int) -> nn.ModuleDict:
        """Linear layers student -> teacher width for the layers compared, none where the widths agree."""
        compared = [0] * bool(self.embeddings) + [low for low, _ in pairs] * bool(self.hidden_states)
        if student_width == teacher_width:
            return nn.ModuleDict()
        return nn.ModuleDict({str(layer): nn.Linear(student_width, teacher_width) for layer in sorted(set(compared))})

    def terms(
        self,
        student: Readings,
        teacher: Readings,
        *,
        token_mask: Tensor,
        pairs: Sequence[tuple[int, int]],
        projections: Mapping[str, nn.Module] | nn.ModuleDict,
        own_loss: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms by name, times their weights; the loss is their sum. token_mask Bool[B, N]; own_loss: on labels."""
        found: dict[str, Tensor] = {}
        if self.logits:
            found["logits"] = self.logits * self._of_logits(student, teacher, token_mask)
        if self.hard_labels:
            assert own_loss is not None
            found["hard_labels"] = self.hard_labels * own_loss

        def distance(low: int, high: int) -> Tensor:
            ours, theirs = student[f"hidden.{low}"][token_mask], teacher[f"hidden.{high}"][token_mask]  # [T, C]
            ours = projections[str(low)](ours) if str(low) in projections else ours
            ours, theirs = ours.float(), theirs.float()
            if self.hidden_distance == "mse":
                return F.mse_loss(ours, theirs)
            return (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean()

        if self.embeddings:
            found["embeddings"] = self.embeddings * distance(0, 0)
        if self.hidden_states:
            found["hidden_states"] = self.hidden_states * _mean([distance(low, high) for low, high in pairs])
        if self.relations:
            each = [
                _relation_divergence(
                    student[f"{kind}.{low}"], teacher[f"{kind}.{high}"], token_mask, self.relation_heads
                )
                for low, high in pairs
                for kind in ("query", "key", "value")
            ]
            found["relations"] = self.relations * _mean(each)
        return found

    def _of_logits(self, student: Readings, teacher: Readings, token_mask: Tensor) -> Tensor:
        names = [sorted(name for name in readings if "." not in name) for readings in (teacher, student)]
        if not names[0] or names[0] != names[1] or ("logits" in teacher and teacher["logits"].ndim != 2):
            raise NotImplementedError(
                f"logits of two classifiers of rows, or of two question answering models, can be compared; the "
                f"teacher gives {names[0] or 'none'} and the student {names[1] or 'none'}: set logits to 0"
            )
        if "logits" in teacher:
            ours, theirs = student["logits"].float(), teacher["logits"].float()  # [B, L]
            if ours.shape[-1] == 1:
                return F.mse_loss(ours, theirs)
            return self._soft_cross_entropy(ours, theirs)
        if "window_scores" in teacher:
            ours, theirs = student["window_scores"].float(), teacher["window_scores"].float()  # [B, M]
            return self._soft_cross_entropy(ours, theirs, theirs > -torch.inf)  # which padded passages have
        each = [
            self._soft_cross_entropy(student[name].float(), teacher[name].float(), token_mask)
            for name in ("start_logits", "end_logits")
        ]
        return _mean(each)

    def _soft_cross_entropy(self, ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> Tensor:
        ours, theirs = ours / self.temperature, theirs / self.temperature
        if mask is not None:
            ours, theirs = ours.masked_fill(~mask, -torch.inf), theirs.masked_fill(~mask, -torch.inf)
        log = ours.log_softmax(-1)
        if mask is not None:
            log = log.masked_fill(~mask, 0)  # 0 * -inf is NaN
        return -(theirs.softmax(-1) * log).sum(-1).mean() * self.temperature**2


def uniform_layers(student: int, teacher: int) -> list[int]:
    """For student layers 1, 2, ...: the teacher layer as far up, the last for the last. ValueError for more layers."""
    if not 1 <= student <= teacher:
        raise ValueError(
            f"a uniform layer map needs 1 to {teacher} student layers, as many as the teacher has; got {student}"
        )
    return [(2 * layer * teacher + student) // (2 * student) for layer in range(1, student + 1)]


def _relation_divergence(ours: Tensor, theirs: Tensor, token_mask: Tensor, heads: int) -> Tensor:
    """KL of the student's relation from the teacher's, mean over rows that are tokens and over relation heads."""
    logs = []
    for x in (theirs.float(), ours.float()):  # [B, N, H*D]
        if x.shape[-1] % heads:
            raise ValueError(
                f"relation_heads={heads} must divide the width of the projections of both models; one has {x.shape[-1]}"
            )
        parts = x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, R, N, D]
        scores = parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5
        # A finite hiding place: rows of padding would be NaN otherwise, and they are left out below.
        logs.append(scores.masked_fill(~token_mask[:, None, None], -1e9).log_softmax(-1))
    divergence = F.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)  # [B, R, N]
    return divergence.transpose(1, 2)[token_mask].mean()


def _mean(values: Sequence[Any]) -> Tensor:
    return torch.stack(list(values)).mean()
