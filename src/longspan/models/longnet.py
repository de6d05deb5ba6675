"""LongNet: dilated attention over segments, in an encoder or a language model.

Source: LongNet, arXiv 2307.02486; its layers are Magneto's, arXiv 2210.06423, with xPos, arXiv 2212.10554.
"""

from __future__ import annotations

from typing import Any

from longspan.attention import DilatedSegments
from longspan.models.language_model import StackConfig, StackForCausalLM, StackModel, StackPreTrainedModel


class LongNetConfig(StackConfig):
    """LongNet as data; the defaults are the paper's, 12 layers of 768 with 12 heads.

    segment_lengths, dilations: the branches of the mixture, in tokens. Each splits the tokens in segments and keeps
        every `dilation`-th token of each.
    offsets: which of them a head keeps: "grouped" as in the released code, "interleaved" as in the paper.
    causal: tokens see only what stands before them; None: in the language model, but not in `LongNetModel`.
    The remaining fields are explained at `longspan.models.decoder.DecoderConfig`.
    """

    model_type = "longnet"

    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilations: tuple[int, ...] = (1, 2, 4, 6, 12)
    offsets: str = "grouped"
    subln: bool = True
    causal: bool | None = None

    def __post_init__(self, **kwargs: Any):
        branches = DilatedSegments.mixture(self.segment_lengths, self.dilations, self.num_attention_heads).branches
        self.segment_lengths, self.dilations = (tuple(numbers) for numbers in zip(*branches, strict=True))
        super().__post_init__(**kwargs)

    @property
    def patterns(self) -> tuple[DilatedSegments, ...]:
        pattern = DilatedSegments.mixture(
            self.segment_lengths,
            self.dilations,
            self.num_attention_heads,
            bool(self.causal),
            self.offsets,  # type: ignore[arg-type]  # checked there
        )
        return (pattern,) * self.num_hidden_layers

    @classmethod
    def tiny(cls, **changes: Any) -> LongNetConfig:
        """A model that two CPU cores train in minutes: 4 layers of 256 with 4 heads."""
        return cls(
            **{
                "hidden_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 1024,
                "segment_lengths": (256, 1024, 4096),
                "dilations": (1, 2, 4),
            }
            | changes
        )


class LongNetPreTrainedModel(StackPreTrainedModel):
    """What the base model and the language model share."""

    config: LongNetConfig
    config_class = LongNetConfig


class LongNetModel(LongNetPreTrainedModel, StackModel):
    """Token ids -> a vector for every token: an encoder, unless the configuration says `causal=True`."""


class LongNetForCausalLM(LongNetPreTrainedModel, StackForCausalLM):
    """LongNet's language model: logits for what follows each token, `generate()` with a bounded cache."""

    model_class = LongNetModel

    def __init__(self, config: LongNetConfig):
        if config.causal is None:
            config.causal = True  # so that the base model is one too, here and when it is loaded alone
        super().__init__(config)
