"""A case whose systems do what the tests need. At module level, so that another process can load it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longspan.bench.measure import Prepared, System

RIGHT = torch.arange(1.0, 9.0)
MIB = 2**20


def allocate(mib: int) -> Tensor:
    return torch.ones(mib * MIB // 4)


def give(output: Tensor, seconds: float) -> Tensor:
    time.sleep(seconds)
    return output


def system(name: str, output: Tensor = RIGHT, *, seconds: float = 0.0, **fields: Any) -> System:
    prepared = Prepared(partial(give, output, seconds), lambda out: (out,))
    return System(**{"name": name, "precision": "fp32", "tolerance": 1e-5, "prepare": lambda: prepared} | fields)


@dataclass
class Example:
    some: list[System] = field(default_factory=list)
    name: str = "case"
    reference: str = "float64"

    @property
    def shape(self) -> dict[str, Any]:
        return {"tokens": 8}

    def systems(self) -> list[System]:
        return self.some

    def expected(self) -> tuple[Tensor, ...]:
        return (RIGHT,)


class Allocating(Example):
    """A system of which a call takes 96 MiB."""

    def systems(self) -> list[System]:
        return [system("96", prepare=lambda: Prepared(partial(allocate, 96), lambda out: ()), ours=True)]
