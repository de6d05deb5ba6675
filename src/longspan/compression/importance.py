"""How much the loss depends on each attention head and each feed-forward unit, to first order.

The change of the loss when a mask m on something goes from 1 to 0 is about -dL/dm. For a head's output that is the sum
of W * dL/dW over its columns of the output projection; so all scores are read from weight gradients, and no
model needs masks. Sources: Michel et al., arXiv 1905.10650, section 4.1 (heads); FastFormers, arXiv 2010.13382,
section 3.2 (units).

Shapes: H heads, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.models.encoder import Block, Encoder


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Scores of every layer, from bottom to top: heads fp32[H], units fp32[F]; all are >= 0 and in units of the loss.

    batches: how many the scores are the mean of.
    """

    heads: tuple[Tensor, ...]
    units: tuple[Tensor, ...]
    batches: int = 1

    def normalized(self) -> Importance:
        """The same with every layer's scores divided by their Euclidean norm, as Michel et al. compare layers."""
        return Importance(
            heads=tuple(_divide(scores) for scores in self.heads),
            units=tuple(_divide(scores) for scores in self.units),
            batches=self.batches,
        )


def measure_importance(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Importance:
    """The mean over batches of each head's and unit's |dL/dmask|.

    model: any of ours; left as it is. It is called with each batch and must give a loss, so batches hold labels; give
    it a calibration split, never the one that the pruned model will be judged by. Smaller batches tell more, since
    what two rows want in opposite directions cancels within a batch.
    Heads count the tokens' output vectors. Units count sum_j W_ij dL/dW_ij + b_i dL/db_i of their row of the
    feed-forward's first projection, which equals sum_t z_ti dL/dz_ti over its values z before the activation; where the
    feed-forward is gated the row is that of the gate. Padding has no share: nothing reads it, so its gradient is 0.
    Raises ValueError for no batch, for a batch without labels and for a loss that is not finite.
    """
    encoder = encoder_of(model)
    blocks = [block for block in encoder.blocks if isinstance(block, Block)]
    weights = [weight for block in blocks for weight in _weights_read(block)]
    heads = [torch.zeros(block.block.heads) for block in blocks]
    units = [torch.zeros(block.block.ffn_width) for block in blocks]
    count = 0
    with _evaluating(model), _wanting_gradients(weights):
        for batch in batches:
            gradients = iter(torch.autograd.grad(_loss(model, batch), weights, materialize_grads=True))
            for layer, block in enumerate(blocks):
                products = [
                    weight.detach().float() * next(gradients).float() for weight in _weights_read(block)
                ]  # [C, H*D], [F, C] and [F] where there is a bias
                of_heads = products[0].sum(0).view(block.block.heads, -1).sum(1)
                of_units = sum(product.view(len(product), -1).sum(1) for product in products[1:])
                assert isinstance(of_units, Tensor)
                heads[layer] += of_heads.abs().cpu()
                units[layer] += of_units[-block.block.ffn_width :].abs().cpu()
            count += 1
    if not count:
        raise ValueError("the calibration split holds no rows: importance is measured on labeled examples; give some")
    return Importance(
        heads=tuple(scores / count for scores in heads), units=tuple(scores / count for scores in units), batches=count
    )


def encoder_of(model: nn.Module) -> Encoder:
    """The encoder of a model of ours; ValueError for another and for one that is packed."""
    encoder = getattr(getattr(model, "base_model", model), "encoder", None)
    if not isinstance(encoder, Encoder):
        raise ValueError(
            f"pruning takes a model that computes with longspan's own encoder, not packed for inference; got "
            f"{type(model).__name__} with {type(encoder).__name__}"
        )
    return encoder


def _weights_read(block: Block) -> list[Tensor]:
    weights = [block.attention.out.weight, block.ffn_in.weight, block.ffn_in.bias]
    return [weight for weight in weights if weight is not None]


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    loss = getattr(model(**inputs), "loss", None)
    if loss is None:
        raise ValueError(
            f"the calibration examples hold no labels, so there is no loss to measure importance by: their fields are "
            f"{', '.join(sorted(batch))}"
        )
    if not loss.isfinite():
        raise ValueError(f"the loss of a calibration batch is {loss.item()}: check the model and its labels")
    return loss


@contextmanager
def _evaluating(model: nn.Module):
    was_training = model.training
    model.eval()  # dropout would be noise in the scores
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _wanting_gradients(weights: list[Tensor]):
    """Frozen weights have an importance too."""
    wanted = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight, want in zip(weights, wanted, strict=True):
            weight.requires_grad_(want)


def _divide(scores: Tensor) -> Tensor:
    return scores / scores.norm().clamp(min=torch.finfo(torch.float32).tiny)
