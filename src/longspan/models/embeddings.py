"""Token ids -> x [B, N, C]: word, position and type embeddings, then a norm.

Shapes: B batch, N tokens, C model width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.models.sequence import WholeSequence


@dataclass(frozen=True, kw_only=True)
class EmbeddingsConfig:
    """How a family turns token ids into vectors.

    positions: rows of the learned position table, 0 for none (rotary models).
    position_offset: rows below the first token's. RoBERTa and Longformer: padding_idx + 1 = 2; BERT: 0.
    positions_skip_padding: number real tokens only and let padding read row `padding_idx` (RoBERTa, Longformer).
    position_period: positions repeat after so many tokens, so a short table serves any length; None = they end.
    type_vocab_size: rows of the token type table, 0 for none.
    """

    vocab_size: int
    width: int
    positions: int = 0
    position_offset: int = 0
    positions_skip_padding: bool = False
    position_period: int | None = None
    type_vocab_size: int = 0
    padding_idx: int | None = 0
    norm_eps: float = 1e-12
    norm_bias: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        usable = self.positions - self.position_offset
        if self.positions and usable < 1:
            raise ValueError(
                f"a position table of {self.positions} rows leaves none after position_offset={self.position_offset}"
            )
        if self.position_period is not None and not 1 <= self.position_period <= usable:
            raise ValueError(
                f"position_period must lie between 1 and the position table's {usable} usable rows; "
                f"got {self.position_period}"
            )
        if self.positions_skip_padding and self.padding_idx is None:
            raise ValueError("positions_skip_padding needs a padding_idx; got None")

    @property
    def max_tokens(self) -> int | None:
        """The longest row these embeddings can number; None = any length."""
        return None if not self.positions or self.position_period else self.positions - self.position_offset

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_length(tokens: int, limit: int) -> None:
    """ValueError where an input is longer than a position table of `limit` tokens."""
    if tokens > limit:
        raise ValueError(
            f"the input needs positions for {tokens:,} tokens and this model has {limit:,}: shorten the input, or "
            f"make the model longer with longspan.to_long(model, max_tokens={tokens})"
        )


class Embeddings(nn.Module):
    """Sum of word, position and type embeddings, normalized."""

    def __init__(self, config: EmbeddingsConfig):
        super().__init__()
        self.config, self.sequence = config, WholeSequence()
        self.word = nn.Embedding(config.vocab_size, config.width, padding_idx=config.padding_idx)
        self.position = nn.Embedding(config.positions, config.width) if config.positions else None
        self.token_type = nn.Embedding(config.type_vocab_size, config.width) if config.type_vocab_size else None
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.norm_bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, C] of input_ids Long[B, N], or of inputs_embeds [B, N, C] in place of the word embeddings.

        position_ids: Long[B or 1, N], rows of the position table as the family counts them, offset included.
        Raises ValueError when both or neither input is given, or a row is longer than the position table.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.word(input_ids) if inputs_embeds is None else inputs_embeds
        if self.token_type is not None:
            types = token_type_ids if token_type_ids is not None else torch.zeros((), dtype=torch.long, device=x.device)
            x = x + self.token_type(types)
        if self.position is not None:
            x = x + self.position(self._rows(x, input_ids, position_ids))
        return self.drop(self.norm(x))

    def number(self, x: Tensor, input_ids: Tensor | None) -> Tensor:
        """Position ids [B or 1, N] of a batch, as the family counts them."""
        return self._number(x, input_ids, self.sequence.span(x.shape[1])[0])

    def _number(self, x: Tensor, input_ids: Tensor | None, start: int) -> Tensor:
        config = self.config
        if not config.positions_skip_padding or input_ids is None:
            return torch.arange(start, start + x.shape[1], device=x.device)[None] + config.position_offset
        is_token = input_ids != config.padding_idx
        passed = self.sequence.before(is_token.sum(1))[:, None]
        return (is_token.long().cumsum(1) + passed) * is_token + config.position_offset - 1

    def _rows(self, x: Tensor, input_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Rows of the position table, [B or 1, N]; ValueError when the table ends before the input does."""
        config = self.config
        start, total = self.sequence.span(x.shape[1])
        rows = self._number(x, input_ids, start) if position_ids is None else position_ids
        if config.position_period is not None:
            repeated = (rows - config.position_offset) % config.position_period + config.position_offset
            return torch.where(rows < config.position_offset, rows, repeated)
        usable = config.positions - config.position_offset
        if (position_ids is None and total <= usable) or not rows.numel() or torch.compiler.is_compiling():
            return rows  # fits whatever the data says: no wait for a GPU
        check_length(self.sequence.most(int(rows.max())) + 1 - config.position_offset, usable)
        return rows
