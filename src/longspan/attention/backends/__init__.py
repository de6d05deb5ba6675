"""Every way to compute attention, in the order in which `attend` asks them."""

from longspan.attention.backends import banded, reference, sdpa
from longspan.attention.request import Backend, Request

BACKENDS: tuple[Backend, ...] = (
    Backend("banded", banded.run, banded.unsupported),
    Backend("sdpa", sdpa.run, sdpa.unsupported),
    Backend("reference", reference.run),
)

__all__ = ["BACKENDS", "Backend", "Request"]
