"""Every way to compute attention, in the order in which `attend` asks them."""

from longspan.attention.backends import banded, reference, sdpa, segments, tiled
from longspan.attention.request import Backend, Request

BACKENDS: tuple[Backend, ...] = (
    Backend("segments", tiled.run, segments.unsupported),
    Backend("banded", tiled.run, banded.unsupported),
    Backend("sdpa", sdpa.run, sdpa.unsupported),
    Backend("reference", reference.run),
)

__all__ = ["BACKENDS", "Backend", "Request"]
