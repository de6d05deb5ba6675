"""What follows attention in a layer of an encoder, in one call of the kernels, where they have linear layers.

Shapes: T rows, C model width, H heads, D head width, F feed-forward width.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, byref, c_int, c_int32, c_int64
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longspan import kernels
from longspan.kernels.linear import Call, PackedWeight, describe_weights
from longspan.kernels.rows import ACTIVATIONS, Matrix, Norm, NormCall, RotaryCall, Turn, matrix, norm_of, rotary_of


class Dense(NamedTuple):
    """A linear layer: its packed weight, bias float32 [N] and the name of the activation that it computes."""

    packed: PackedWeight
    bias: Tensor | None
    activation: str | None = None


class Layer:
    """Output projection, norm, feed-forward, norm and the next layer's projection to queries, keys and values.

    out, ffn_in, ffn_out, qkv: the linear layers; qkv None for the last layer. attention_norm, ffn_norm: the norms that
    follow attention and feed-forward. pre_norm: they are of the copy of the stream that the linear layers read, not of
    the stream itself. activation: of the feed-forward. gated: it stands between the halves of what ffn_in gives, and
    ffn_in does not compute it.
    It never changes, so that copies of it are itself.
    """

    def __init__(
        self,
        out: Dense,
        ffn_in: Dense,
        ffn_out: Dense,
        qkv: Dense | None,
        attention_norm: Norm,
        ffn_norm: Norm,
        *,
        pre_norm: bool,
        activation: str,
        gated: bool,
    ):
        self._parts = (out, ffn_in, ffn_out, qkv, attention_norm, ffn_norm)  # the call holds their addresses
        self._how = {"pre_norm": pre_norm, "activation": activation, "gated": gated}
        self.width = out.packed.out_features
        linears = [describe_weights(*part) if part else Call() for part in (out, ffn_in, ffn_out, qkv)]
        norms = [norm_of(part, None, None, torch.Size((0, self.width))) for part in (attention_norm, ffn_norm)]
        self._call = _Layer(*linears, *norms, pre_norm, ACTIVATIONS[activation], gated)

    def __call__(self, rows: LayerRows) -> None:
        """Adds to the stream and writes the next layer's queries, keys and values, where `rows` says they lie."""
        library = kernels.library()
        assert library is not None
        _declared(library).longspan_layer_forward(byref(self._call), byref(rows))

    def rows(
        self, attended: Tensor, stream: Tensor, *, normed: Tensor | None, qkv: Tensor | None, turn: Turn | None
    ) -> LayerRows:
        """Where the rows of a call lie, for this layer and all of the same widths. The tensors must outlive it.

        attended: [T, H*D], what is read. stream: [T, C], what is added to. qkv: [T, 3*H*D], of the next layer. normed:
        where what qkv reads of a pre-norm stream is to be kept, [T, C]. turn: rotary positions of qkv.
        """
        out, *_, following, _, _ = self._parts
        rows = len(stream)
        shape = torch.Size((rows, self.width))
        call = LayerRows(
            rows,
            matrix(attended, torch.Size((rows, out.packed.in_features))),
            matrix(stream, shape),
            matrix(normed, shape),
        )
        if following is not None and qkv is not None:
            whole = torch.Size((rows, following.packed.out_features))
            call.qkv = matrix(qkv, whole)
            if turn is not None:
                call.rotary = rotary_of(turn, whole)
        return call

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        return self

    def __reduce__(self):  # addresses cannot be pickled
        return functools.partial(Layer, **self._how), self._parts


class _Layer(Structure):
    _fields_ = (
        *((name, Call) for name in ("out", "ffn_in", "ffn_out", "qkv")),
        *((name, NormCall) for name in ("attention_norm", "ffn_norm")),
        *((name, c_int32) for name in ("pre_norm", "activation", "gated")),
    )


class LayerRows(Structure):
    _fields_ = (
        ("rows", c_int64),
        *((name, Matrix) for name in ("attended", "stream", "normed", "qkv")),
        ("rotary", RotaryCall),
    )


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    function = library.longspan_layer_forward
    function.argtypes = (POINTER(_Layer), POINTER(LayerRows))
    function.restype, function.errcheck = c_int, kernels.check_status  # type: ignore[assignment]
    return library
