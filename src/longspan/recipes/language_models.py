"""Language models by name: a model, its schedule and its settings, as published or small enough for two CPU cores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from longspan.models.longformer_lm import LongformerForCausalLM, LongformerLMConfig
from longspan.models.longnet import LongNetConfig, LongNetForCausalLM
from longspan.training.curriculum import Curriculum, Phase


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe:
    """model: vocabulary size -> an untrained model. settings: fields of LanguageTraining beside the curriculum."""

    model: Callable[[int], Any]
    curriculum: Curriculum
    settings: dict[str, Any] = field(default_factory=dict)
    about: str = ""


def paper_stages(windows: tuple[int, ...], steps: tuple[int, ...]) -> Curriculum:
    """The five phases of the Longformer paper's appendix B.

    Rows of 2,048 to 23,040 tokens, learning rates from 2.5e-4 that halve and stay, 10% of each phase (10,000 steps at
    most) to warm up. windows: of the last phase; every phase before has half of the next one's, which gives the bottom
    layer the paper's 32 to 512. (Of the top layer the paper says 8,192 and no more.)
    """
    phases = []
    for number, (count, length, batch) in enumerate(
        zip(steps, (2048, 4096, 8192, 16384, 23040), (32, 32, 16, 16, 16), strict=True)
    ):
        phases.append(
            Phase(
                steps=count,
                length=length,
                batch=batch,
                learning_rate=2.5e-4 / 2**number,
                warmup_steps=min(count // 10, 10_000),
                windows=tuple(max(1, window >> (4 - number)) for window in windows),
            )
        )
    return Curriculum(phases=tuple(phases))


def tiny_stages(
    *,
    tokens: int,
    tokens_per_step: int,
    length: int,
    learning_rate: float,
    windows: tuple[int, ...] = (),
    shares: tuple[float, ...] = (0.6, 0.2, 0.1, 0.1),
    growing: bool = True,
) -> Curriculum:
    """A schedule for small models and few tokens: learning rates that fall in a line, halved from stage to stage, to 0.

    growing: rows and windows double from stage to stage up to `length` and `windows`; else they are so from the first.
    Every step reads tokens_per_step tokens. ValueError for sizes that do not divide each other.
    """
    last = len(shares) - 1
    if length % 2**last or tokens_per_step % length:
        raise ValueError(
            f"length must be a multiple of {2**last}, for {len(shares)} stages, and tokens_per_step one of length; got "
            f"length {length:,} and {tokens_per_step:,} tokens per step"
        )
    phases = []
    for stage, share in enumerate(shares):
        shorter = 2 ** (last - stage) if growing else 1
        rate = learning_rate / 2**stage
        phases.append(
            Phase(
                steps=round(share * 10_000),
                length=length // shorter,
                batch=tokens_per_step // (length // shorter),
                learning_rate=rate,
                final_learning_rate=0.0 if stage == last else rate / 2,
                warmup_steps=0 if stage else round(share * 300),
                windows=tuple(max(1, window // shorter) for window in windows) or None,
            )
        )
    return Curriculum(phases=tuple(phases)).in_steps(max(len(shares), round(tokens / tokens_per_step)))


def _longformer(config: LongformerLMConfig, curriculum: Curriculum, about: str, **settings: Any) -> LanguageRecipe:
    described = config.to_dict()

    def model(vocabulary: int) -> Any:
        return LongformerForCausalLM(LongformerLMConfig.from_dict(described | {"vocab_size": vocabulary}))

    return LanguageRecipe(model=model, curriculum=curriculum, settings=settings, about=about)


def longformer_tiny() -> LanguageRecipe:
    config = LongformerLMConfig.tiny()
    assert isinstance(config.windows, tuple)
    stages = tiny_stages(
        tokens=40_000_000, tokens_per_step=8192, length=8192, learning_rate=2e-3, windows=config.windows
    )
    return _longformer(config, stages, "4 layers of 256; about an hour on two CPU cores")


def longformer_small() -> LanguageRecipe:
    config = LongformerLMConfig.small()
    assert isinstance(config.windows, tuple)
    stages = paper_stages(config.windows, (430_000, 50_000, 50_000, 35_000, 5_000))
    return _longformer(config, stages, "the paper's small model, 12 layers of 512", **_PAPER)


def longformer_large() -> LanguageRecipe:
    config = LongformerLMConfig.large()
    assert isinstance(config.windows, tuple)
    stages = paper_stages(config.windows, (350_000, 25_000, 10_000, 5_000, 5_000))
    return _longformer(config, stages, "the paper's large model, 30 layers of 512", **_PAPER)


def longnet_tiny() -> LanguageRecipe:
    stages = tiny_stages(tokens=40_000_000, tokens_per_step=8192, length=8192, learning_rate=2e-3, growing=False)
    return LanguageRecipe(
        model=lambda vocabulary: LongNetForCausalLM(LongNetConfig.tiny(vocab_size=vocabulary)),
        curriculum=stages,
        about="4 layers of 256; about an hour on two CPU cores",
    )


# Appendix B of the paper; betas are AdamW's own there.
_PAPER: dict[str, Any] = {"weight_decay": 0.01, "max_grad_norm": 0.25, "betas": (0.9, 0.999), "accumulate": 16}

RECIPES: dict[str, Callable[[], LanguageRecipe]] = {
    "longformer-tiny": longformer_tiny,
    "longformer-small": longformer_small,
    "longformer-large": longformer_large,
    "longnet-tiny": longnet_tiny,
}


def recipe_of(name: str) -> LanguageRecipe:
    """The recipe of that name. ValueError lists the names there are."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there is {', '.join(RECIPES)}")
    return RECIPES[name]()
