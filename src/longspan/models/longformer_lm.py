"""The Longformer's language model: causal windows that grow from the bottom layer to the top, some heads dilated.

Source: Longformer, arXiv 2004.05150, sections 3 and 4 and appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longspan.attention import SlidingWindow
from longspan.models.language_model import StackConfig, StackForCausalLM, StackModel, StackPreTrainedModel


def growing_windows(bottom: int, top: int, layers: int) -> tuple[int, ...]:
    """A window for each layer from bottom to top: powers of two times `bottom`, evenly spread, the last one `top`."""
    if not 1 <= bottom <= top or layers < 1:
        raise ValueError(f"windows grow from bottom >= 1 to top >= bottom over layers >= 1; got {bottom, top, layers}")
    doublings = (top // bottom).bit_length() - 1
    windows = [bottom << round(layer * doublings / max(1, layers - 1)) for layer in range(layers)]
    return (*windows[:-1], top)


class LongformerLMConfig(StackConfig):
    """The Longformer's language model as data.

    windows: for each layer from bottom to top, how many keys before itself a token sees; one number for all layers.
    dilations: for each layer, tokens from one key to the next in the dilated heads; 1 leaves no gaps (the paper's 0).
    dilated_heads: so many of each layer's heads, the last ones, are dilated. A head with a dilation looks that many
        times further back.
    The remaining fields are explained at `longspan.models.decoder.DecoderConfig`; dropout 0.2 and 0.4 are the paper's.
    """

    model_type = "longformer_lm"

    num_hidden_layers: int = 12
    windows: int | tuple[int, ...] = 512
    dilations: int | tuple[int, ...] = 1
    dilated_heads: int = 2

    def __post_init__(self, **kwargs: Any):
        self.windows = _per_layer("windows", self.windows, self.num_hidden_layers)
        self.dilations = _per_layer("dilations", self.dilations, self.num_hidden_layers)
        if not 0 <= self.dilated_heads <= self.num_attention_heads:
            raise ValueError(
                f"dilated_heads must lie between 0 and num_attention_heads, {self.num_attention_heads}; "
                f"got {self.dilated_heads}"
            )
        super().__post_init__(**kwargs)

    @property
    def patterns(self) -> tuple[SlidingWindow, ...]:
        plain = self.num_attention_heads - self.dilated_heads
        assert not isinstance(self.windows, int) and not isinstance(self.dilations, int)  # since __post_init__
        return tuple(
            SlidingWindow(window, 0, 1 if dilation == 1 else (1,) * plain + (dilation,) * self.dilated_heads)
            for window, dilation in zip(self.windows, self.dilations, strict=True)
        )

    @classmethod
    def small(cls, **changes: Any) -> LongformerLMConfig:
        """The paper's small character model, 12 layers of 512 with 8 heads, with the windows of its last phase.

        The paper names the windows of the bottom and the top layer, 512 and 8,192; between them these double.
        """
        return cls(
            **{
                "windows": growing_windows(512, 8192, 12),
                "dilations": (1,) * 6 + (2,) * 2 + (3,) * 2 + (4,) * 2,
                "dropout": 0.2,
            }
            | changes
        )

    @classmethod
    def large(cls, **changes: Any) -> LongformerLMConfig:
        """The paper's large character model, 30 layers of 512 with 8 heads; windows as in `small`."""
        return cls(
            **{
                "num_hidden_layers": 30,
                "windows": growing_windows(512, 8192, 30),
                "dilations": (1,) * 15 + (2,) * 5 + (3,) * 5 + (4,) * 5,
                "dropout": 0.4,
            }
            | changes
        )

    @classmethod
    def tiny(cls, **changes: Any) -> LongformerLMConfig:
        """A model that two CPU cores train in minutes: 4 layers of 256 with 4 heads."""
        return cls(
            **{
                "hidden_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 1024,
                "windows": growing_windows(64, 512, 4),
                "dilations": (1, 1, 2, 2),
            }
            | changes
        )


class LongformerLMPreTrainedModel(StackPreTrainedModel):
    """What the base model and the language model share."""

    config: LongformerLMConfig
    config_class = LongformerLMConfig

    def set_windows(self, windows: int | Sequence[int]) -> None:
        """Other windows, from the bottom layer to the top, in the layers and in the configuration. No weight changes.

        For training in stages whose windows and lengths grow (Longformer, section 4.2.1).
        """
        self.config.windows = _per_layer("windows", windows, self.config.num_hidden_layers)
        base: Any = self.base_model
        base.decoder.patterns = self.config.patterns


class LongformerLMModel(LongformerLMPreTrainedModel, StackModel):
    """Token ids -> a vector for every token, which has seen those before it."""


class LongformerForCausalLM(LongformerLMPreTrainedModel, StackForCausalLM):
    """The Longformer's language model: logits for what follows each token, `generate()` with a bounded cache."""

    model_class = LongformerLMModel


def _per_layer(name: str, numbers: int | Sequence[int], layers: int) -> tuple[int, ...]:
    each = tuple(numbers) if isinstance(numbers, Sequence) else (numbers,) * layers
    if len(each) != layers or not all(isinstance(number, int) and number >= 1 for number in each):
        raise ValueError(
            f"{name} must be one whole number >= 1, or one for each of the {layers} layers from bottom to top; "
            f"got {numbers}"
        )
    return each
