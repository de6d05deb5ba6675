"""One sequence on several processes: attention whose keys lie on other ranks."""

from longspan.distributed.attention import attend
from longspan.distributed.shards import SequenceShards

__all__ = ["SequenceShards", "attend"]
