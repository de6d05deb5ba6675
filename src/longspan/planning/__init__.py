"""What a model asks of many devices that share one long sequence: operations, memory and bytes, before it runs."""

from longspan.planning.model import ModelSizes, sizes_of
from longspan.planning.plan import Plan, plan

__all__ = ["ModelSizes", "Plan", "plan", "sizes_of"]
