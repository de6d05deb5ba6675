"""Every way to compute attention, in the order in which `attend` asks them."""

from longspan.attention.backends import banded, flex, native, reference, sdpa, segments, tiled
from longspan.attention.request import Backend, Request

BACKENDS: tuple[Backend, ...] = (
    Backend("native", native.run, native.unsupported, native.slower),
    Backend("segments", tiled.run, segments.unsupported, segments.slower),
    Backend("banded", tiled.run, banded.unsupported, banded.slower),
    Backend("sdpa", sdpa.run, sdpa.unsupported),
    Backend("flex", flex.run, flex.unsupported, flex.slower),
    Backend("reference", reference.run),
)

__all__ = ["BACKENDS", "Backend", "Request"]
