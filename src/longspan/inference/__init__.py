"""Models at work: answers from documents, and worker processes. The names below load on first use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan.inference.workers import WorkerCrashed as WorkerCrashed
    from longspan.inference.workers import WorkerPool as WorkerPool

__all__ = ["WorkerCrashed", "WorkerPool"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'longspan.inference' has no attribute {name!r}; it has {', '.join(__all__)}.")
    from longspan.inference import workers

    return getattr(workers, name)
