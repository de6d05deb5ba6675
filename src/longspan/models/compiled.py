"""The encoder for inference on CUDA: compiled FlexAttention, and the feed-forward compiled by torch.

It was written without such a device, and no time of it was measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longspan.models.encoder import Encoder
from longspan.models.packed import InferenceEncoder, Precision, check_precision

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CompiledEncoder(InferenceEncoder):
    """What `Encoder` computes, in "fp32", "bf16" or "fp16". The first call compiles.

    encoder: becomes part of this one and changes its dtype. compiler: torch.compile's backend.
    """

    def __init__(self, encoder: Encoder, precision: Precision, *, compiler: str = "inductor"):
        super().__init__()
        check_precision(precision, torch.device("cuda"))
        self.config, self.precision = encoder.config, precision
        self.encoder = encoder.to(DTYPES[precision]).requires_grad_(False)
        blocks: Any = self.encoder.blocks
        for block in blocks:
            block.feed_forward = torch.compile(block.feed_forward, backend=compiler)
        self.eval()

    @property
    def blocks(self):
        return self.encoder.blocks

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        global_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """As `Encoder.forward`, in the dtype of x; padded rows are 0. backend: "auto" is "flex"."""
        return self.hidden_states(x, token_mask, global_mask, position_ids=position_ids, backend=backend)[-1]

    def hidden_states(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        global_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, ...]:
        """x itself and the state after every block; the last one is what `forward` gives (final norm included)."""
        self.check_call(x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            _, *states = self.encoder.hidden_states(
                x.to(DTYPES[self.precision]),
                token_mask,
                global_mask,
                position_ids=position_ids,
                backend="flex" if backend == "auto" else backend,
            )
            if token_mask is not None:
                states = [state.masked_fill(~token_mask[..., None], 0) for state in states]
            return x, *(state.to(x.dtype) for state in states)
