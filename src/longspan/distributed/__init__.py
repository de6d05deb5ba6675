"""One sequence on several processes: attention whose keys lie on other ranks, and models that compute by it."""

from typing import TYPE_CHECKING, Any

from longspan.distributed.attention import attend
from longspan.distributed.shards import SequenceShards

if TYPE_CHECKING:
    from longspan.distributed.sequence import shard as shard
    from longspan.distributed.sequence import unshard as unshard

__all__ = ["SequenceShards", "attend", "shard", "unshard"]


def __getattr__(name: str) -> Any:
    if name not in ("shard", "unshard"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from longspan.distributed import sequence  # which loads transformers; attention does without

    return getattr(sequence, name)
