"""What the configurations of five Hugging Face families mean: each as the fields of a LongspanConfig."""

from __future__ import annotations

from typing import Any

from longspan.attention import Full, SlidingWindow
from longspan.models.config import HeadConfig
from longspan.models.embeddings import EmbeddingsConfig
from longspan.models.encoder import ACTIVATIONS, BlockConfig, EncoderConfig


def refuse_unless(fine: bool, hf_config: Any, option: str, allowed: str) -> None:
    """NotImplementedError that names the option, what it holds and what it may hold."""
    if not fine:
        raise NotImplementedError(
            f"{option}={getattr(hf_config, option, None)!r} in a {hf_config.model_type} configuration: "
            f"longspan runs {option} = {allowed} only"
        )


def _activation(hf_config: Any, option: str) -> str:
    name = getattr(hf_config, option)
    refuse_unless(name in ACTIVATIONS, hf_config, option, " or ".join(map(repr, ACTIVATIONS)))
    return name


def bert(hf: Any) -> dict[str, Any]:
    """Positions counted from 0, padding included; a pooler; dense attention."""
    act, dropout = _activation(hf, "hidden_act"), hf.hidden_dropout_prob
    block = BlockConfig(
        heads=hf.num_attention_heads,
        head_width=hf.hidden_size // hf.num_attention_heads,
        ffn_width=hf.intermediate_size,
    )
    encoder = EncoderConfig(
        width=hf.hidden_size,
        blocks=(block,) * hf.num_hidden_layers,
        norm_eps=hf.layer_norm_eps,
        activation=act,
        dropout=dropout,
        attention_dropout=hf.attention_probs_dropout_prob,
    )
    embeddings = EmbeddingsConfig(
        vocab_size=hf.vocab_size,
        width=hf.hidden_size,
        positions=hf.max_position_embeddings,
        type_vocab_size=hf.type_vocab_size,
        padding_idx=hf.pad_token_id,
        norm_eps=hf.layer_norm_eps,
        dropout=dropout,
    )
    last = dropout if getattr(hf, "classifier_dropout", None) is None else hf.classifier_dropout
    pooled = HeadConfig(pooling="pooler", dropout=last)
    return _fields(
        embeddings,
        encoder,
        pooler=True,
        masked_lm=HeadConfig(activation=act, norm_eps=hf.layer_norm_eps),
        sequence_classification=pooled,
        token_classification=HeadConfig(dropout=last),
        question_answering=HeadConfig(),
        multiple_choice=pooled,
    )


def roberta(hf: Any) -> dict[str, Any]:
    """BERT with positions that skip padding and start at padding_idx + 1, and heads of its own."""
    fields = bert(hf)
    dropout = fields["heads"]["token_classification"]["dropout"]
    numbering = {"position_offset": hf.pad_token_id + 1, "positions_skip_padding": True}
    heads = {
        "masked_lm": HeadConfig(activation="gelu", norm_eps=hf.layer_norm_eps),  # whatever hidden_act says
        "sequence_classification": HeadConfig(
            pooling="first", input_dropout=dropout, activation="tanh", dropout=dropout
        ),
        "multiple_choice": HeadConfig(pooling="pooler", dropout=hf.hidden_dropout_prob),
    }
    return fields | {
        "embeddings": fields["embeddings"] | numbering,
        "heads": fields["heads"] | {task: head.to_dict() for task, head in heads.items()},
        "trained_tokens": hf.max_position_embeddings - hf.pad_token_id - 1,
    }


def longformer(hf: Any) -> dict[str, Any]:
    """RoBERTa with a window in every layer, global projections, and heads that choose global tokens."""
    fields = roberta(hf)
    blocks = fields["encoder"]["blocks"]
    windows = hf.attention_window if isinstance(hf.attention_window, list) else [hf.attention_window] * len(blocks)
    if len(windows) != len(blocks) or any(total < 2 or total % 2 for total in windows):
        raise ValueError(
            f"attention_window must be one even number of tokens, or one for each of {len(blocks)} layers; "
            f"got {hf.attention_window}"
        )
    blocks = [
        # Hugging Face counts both sides together.
        block | {"pattern": SlidingWindow(total // 2, total // 2).to_dict(), "global_projections": True}
        for block, total in zip(blocks, windows, strict=True)
    ]
    seen = {
        "sequence_classification": "first",
        "question_answering": "before_separator",
        "multiple_choice": "after_separator",
    }
    heads = {task: head | {"global_tokens": seen.get(task)} for task, head in fields["heads"].items()}
    return fields | {"encoder": fields["encoder"] | {"blocks": blocks}, "heads": heads}


def distilbert(hf: Any) -> dict[str, Any]:
    """BERT without token types and pooler, and without dropout after attention."""
    act = _activation(hf, "activation")
    block = BlockConfig(heads=hf.n_heads, head_width=hf.dim // hf.n_heads, ffn_width=hf.hidden_dim)
    encoder = EncoderConfig(
        width=hf.dim,
        blocks=(block,) * hf.n_layers,
        activation=act,
        dropout=hf.dropout,
        attention_out_dropout=0.0,
        attention_dropout=hf.attention_dropout,
    )
    embeddings = EmbeddingsConfig(
        vocab_size=hf.vocab_size,
        width=hf.dim,
        positions=hf.max_position_embeddings,
        padding_idx=hf.pad_token_id,
        dropout=hf.dropout,
    )
    pooled = HeadConfig(pooling="first", activation="relu", dropout=hf.seq_classif_dropout)
    return _fields(
        embeddings,
        encoder,
        masked_lm=HeadConfig(activation=act, norm_eps=1e-12),
        sequence_classification=pooled,
        token_classification=HeadConfig(dropout=hf.dropout),
        question_answering=HeadConfig(dropout=hf.qa_dropout),
        multiple_choice=pooled,
    )


def modernbert(hf: Any) -> dict[str, Any]:
    """Pre-norm, rotary positions, gated feed-forward, windows in most layers. Hugging Face enforces no length."""
    side = hf.local_attention // 2
    patterns = {"full_attention": Full(), "sliding_attention": SlidingWindow(side, side)}
    for kind in patterns:
        rope = hf.rope_parameters[kind] or {}
        plain = set(rope) <= {"rope_type", "rope_theta"} and rope.get("rope_type") == "default"
        refuse_unless(plain, hf, "rope_parameters", "{'rope_type': 'default', 'rope_theta': ...}")
    refuse_unless(set(hf.layer_types) <= set(patterns), hf, "layer_types", " or ".join(map(repr, patterns)))
    blocks = tuple(
        BlockConfig(
            heads=hf.num_attention_heads,
            head_width=hf.hidden_size // hf.num_attention_heads,
            ffn_width=hf.intermediate_size,
            pattern=patterns[kind],
            rope_theta=hf.rope_parameters[kind]["rope_theta"],
            attention_norm=layer > 0,
        )
        for layer, kind in enumerate(hf.layer_types)
    )
    norm = {"norm_eps": hf.norm_eps, "norm_bias": hf.norm_bias}
    encoder = EncoderConfig(
        width=hf.hidden_size,
        blocks=blocks,
        norm="pre",
        **norm,
        attention_bias=hf.attention_bias,
        ffn_bias=hf.mlp_bias,
        activation=_activation(hf, "hidden_activation"),
        gated=True,
        attention_out_dropout=hf.attention_dropout,
        attention_dropout=hf.attention_dropout,
        ffn_inner_dropout=hf.mlp_dropout,
    )
    embeddings = EmbeddingsConfig(
        vocab_size=hf.vocab_size,
        width=hf.hidden_size,
        padding_idx=hf.pad_token_id,
        **norm,
        dropout=hf.embedding_dropout,
    )
    dense = {"activation": _activation(hf, "classifier_activation"), "dense_bias": hf.classifier_bias, **norm}
    each = HeadConfig(**dense, dropout=hf.classifier_dropout)
    pooled = HeadConfig(
        **dense, dropout=hf.classifier_dropout, pooling="first" if hf.classifier_pooling == "cls" else "mean"
    )
    return _fields(
        embeddings,
        encoder,
        trained_tokens=hf.max_position_embeddings,
        masked_lm=HeadConfig(**dense, output_bias=hf.decoder_bias),
        sequence_classification=pooled,
        token_classification=each,
        question_answering=each,
        multiple_choice=pooled,
    )


def _fields(
    embeddings: EmbeddingsConfig,
    encoder: EncoderConfig,
    *,
    pooler: bool = False,
    trained_tokens: int | None = None,
    **heads: HeadConfig,
) -> dict[str, Any]:
    return {
        "embeddings": embeddings.to_dict(),
        "encoder": encoder.to_dict(),
        "heads": {task: head.to_dict() for task, head in heads.items()},
        "pooler": pooler,
        "trained_tokens": trained_tokens or embeddings.max_tokens,
    }
