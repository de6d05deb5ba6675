"""Long against short context on real text, for two CPU cores: character models of one size, trained at equal compute.

A Longformer in the stages of its paper (arXiv 2004.05150, section 4), LongNet (arXiv 2307.02486), full attention on
rows as long as it can afford, and the Longformer without stages, on Wikipedia articles in text8's alphabet. Then the
paper's ablations at a smaller scale. Every run has a folder of its own, and a killed recipe goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longspan.inference.evidence import uses_bf16
from longspan.inference.run_folder import remember, write_whole
from longspan.models.longformer_lm import LongformerForCausalLM, LongformerLMConfig
from longspan.models.longnet import LongNetConfig, LongNetForCausalLM
from longspan.models.text_tokenizers import TEXT8_ALPHABET
from longspan.recipes.language_models import tiny_stages
from longspan.tasks.articles import write_splits
from longspan.tasks.language import bits_of_windows, compressors
from longspan.training.curriculum import Curriculum, forward_operations
from longspan.training.curves import draw_curves
from longspan.training.language import LanguageTraining, TrainedLanguageModel, train_language_model
from longspan.training.texts import find_texts
from longspan.training.token_files import TokenFiles, make_token_files

# Shares of the tokens that the four stages get; the paper's small model: 75%, 9%, 9%, 6% and 1% of the steps.
STAGES = (0.6, 0.2, 0.1, 0.1)
MEASURED_STEPS = 4
MOST_OPERATIONS = 1e14  # to evaluate a model at one length: some ten minutes on two cores


@dataclass(frozen=True, kw_only=True)
class System:
    """A row of the table.

    kind: "longformer" or "longnet". windows: keys before a token, a layer; of the last stage where there are stages.
    length: tokens of a training row, of the last stage likewise. dilations: a layer, on two of the heads.
    """

    name: str
    kind: str
    length: int
    windows: tuple[int, ...] = ()
    dilations: tuple[int, ...] | int = 1
    staged: bool = False
    share: float = 1.0
    ablation: bool = False

    @property
    def folder(self) -> str:
        return self.name.lower().replace(",", "").replace(" ", "-")


@dataclass(frozen=True, kw_only=True)
class Characters:
    """Everything that decides the recipe.

    output: folder of all steps. articles: .jsonl or .jsonl.xz of whole articles, a sentence a line.
    minutes: what the slowest of the four trainings may take on this machine; it is measured, and decides how many
    tokens all of them read. tokens: so many instead.
    tokens_per_step, learning_rate: the highest of a schedule that all share. windows: of the Longformer's last stage.
    length: of the rows of its last stage. full_length: of the rows that full attention reads.
    lengths: at which the table evaluates, scoring the last `scored` characters of `stretches` stretches of the test
    split that are the same at all lengths.
    ablation_share: of the tokens, for each of the ablations; 0 leaves them out.
    """

    output: str
    articles: str
    minutes: float = 50.0
    tokens: int | None = None
    tokens_per_step: int = 8192
    learning_rate: float = 2e-3
    width: int = 256
    layers: int = 4
    heads: int = 4
    windows: tuple[int, ...] = (128, 256, 1024, 2048)
    dilations: tuple[int, ...] = (1, 1, 2, 4)
    segments: tuple[tuple[int, int], ...] = ((256, 1), (1024, 2), (4096, 4))
    length: int = 8192
    full_length: int = 1024
    lengths: tuple[int, ...] = (512, 2048, 8192, 32256)
    scored: int = 256
    stretches: int = 128
    ablation_share: float = 0.2
    megabytes: float | None = None
    test_share: float = 0.025
    bf16: bool | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("windows", "dilations"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != self.layers:
                raise ValueError(
                    f"{name} must be one number for each of {self.layers} layers; got {getattr(self, name)}"
                )
        if not self.minutes > 0:
            raise ValueError(f"minutes must be greater than 0; got {self.minutes}")
        if self.tokens is not None and self.tokens < self.tokens_per_step * len(STAGES):
            raise ValueError(
                f"tokens must be at least {self.tokens_per_step * len(STAGES):,}, a step for each stage; "
                f"got {self.tokens:,}"
            )
        if (
            self.length % 2 ** (len(STAGES) - 1)
            or self.tokens_per_step % self.length
            or self.tokens_per_step % self.full_length
        ):
            raise ValueError(
                f"length must be a multiple of 8, and tokens_per_step one of length and of full_length; got "
                f"{self.length:,}, {self.tokens_per_step:,} and {self.full_length:,}"
            )
        if self.scored >= min(self.lengths):
            raise ValueError(f"scored must be smaller than every length; got {self.scored:,} and {self.lengths}")
        if not 0 <= self.ablation_share <= 1:
            raise ValueError(f"ablation_share must lie between 0 and 1; got {self.ablation_share}")

    @classmethod
    def quick(cls, output: str, articles: str, **changes: Any) -> Characters:
        """Every step in a few minutes, to see that all of them work. The figures mean nothing."""
        small: dict[str, Any] = {
            "tokens": 16_384,
            "tokens_per_step": 1024,
            "width": 32,
            "windows": (8, 16, 32, 64),
            "segments": ((64, 1), (256, 2), (512, 4)),
            "length": 512,
            "full_length": 64,
            "lengths": (64, 128, 256, 512),
            "scored": 32,
            "stretches": 4,
            "ablation_share": 0.5,
            "megabytes": 1.0,
        }
        return cls(output=output, articles=articles, **(small | changes))

    def systems(self) -> tuple[System, ...]:
        """The rows of the table, and the ablations."""
        top, bottom = self.windows, self.windows[::-1]
        even = (round(sum(self.windows) / self.layers),) * self.layers
        plain = {"kind": "longformer", "length": self.length}
        rows = (
            System(name="Longformer, staged", windows=top, dilations=self.dilations, staged=True, **plain),
            System(name="LongNet", kind="longnet", length=self.length),
            System(
                name="full attention",
                kind="longformer",
                length=self.full_length,
                windows=(max(self.lengths),) * self.layers,
            ),
            System(name="Longformer, not staged", windows=top, dilations=self.dilations, **plain),
        )
        part = plain | {"share": self.ablation_share, "ablation": True}
        ablations = (
            System(name="windows decreasing", windows=bottom, **part),
            System(name="windows equal", windows=even, **part),
            System(name="windows increasing", windows=top, **part),
            System(name="windows increasing, two heads dilated", windows=top, dilations=self.dilations, **part),
        )
        return rows + (ablations if self.ablation_share else ())


@dataclass(frozen=True, kw_only=True)
class Row:
    """bits: per character at each length; None where that would take too long, or is left out for an ablation.

    gain: bits at the shortest length less those at the longest, with the standard error of that over the stretches.
    length: of a training row, at the end. minutes: of training. operations: of training, forward and back.
    """

    name: str
    ablation: bool
    parameters: int
    tokens: int
    length: int
    bits: dict[int, float | None]
    gain: float
    gain_error: float
    dev_bits: float
    tokens_per_second: float
    minutes: float
    peak_memory_gib: float
    operations: float


def characters(config: Characters, *, tell: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The table with its references, as output/report.json keeps it, and output/curves.png.

    tell: is called with lines about what is done.
    Raises FileNotFoundError where the articles are missing, and what the steps raise.
    """
    steps = Steps(config, tell)
    rows, histories = [], {}
    for system in config.systems():
        trained = steps.trained(system)
        histories[system.name] = trained.history
        rows.append(steps.row(system, trained))
        shown = ", ".join(
            f"{length:,}: {'-' if bits is None else f'{bits:.4f}'}" for length, bits in rows[-1].bits.items()
        )
        tell(f"{system.name}: bits per character at {shown}")
    draw_curves(histories, steps.output / "curves.png", unit="character")
    test = steps.tokens.splits["test"]
    report = {
        "text": steps.tokens.units,
        "evaluated": {"scored": config.scored, "stretches": len(steps.ends), "test_characters": len(test)},
        "rows": [asdict(row) for row in rows],
        "references": steps.references(),
        "config": {name: value for name, value in asdict(config).items() if name not in ("output", "articles")},
        "threads": torch.get_num_threads(),
    }
    write_whole(steps.output / "report.json", json.dumps(report, indent=2) + "\n")
    return report


class Steps:
    """The steps of the recipe, each kept in a folder or file of its own."""

    def __init__(self, config: Characters, tell: Callable[[str], None]):
        self.config, self.tell, self.output = config, tell, Path(config.output)
        decides = {
            name: value for name, value in asdict(config).items() if name not in ("output", "articles", "minutes")
        }
        remember(self.output, decides)

    @cached_property
    def tokens(self) -> TokenFiles:
        config = self.config
        folder = write_splits(
            config.articles,
            self.output / "text",
            share=config.test_share,
            megabytes=config.megabytes,
            seed=config.seed,
            tell=self.tell,
        )
        return make_token_files(
            find_texts(folder), self.output / "tokens", "character", alphabet=TEXT8_ALPHABET, tell=self.tell
        )

    @cached_property
    def ends(self) -> Any:
        """Where the evaluated stretches end: apart from each other, with the longest length before them."""
        config, size = self.config, len(self.tokens.splits["test"])
        places = np.arange(max(config.lengths), size + 1, config.scored)
        if not len(places):
            raise ValueError(
                f"the test split has {size:,} characters, and the longest length to evaluate is "
                f"{max(config.lengths):,}: give more articles, a larger test_share or shorter lengths"
            )
        rng = np.random.default_rng(config.seed)
        return np.sort(rng.permutation(places)[: config.stretches])

    @property
    def _ablation_length(self) -> int:
        """The longest length that the ablations were trained on."""
        return max(
            (length for length in self.config.lengths if length <= self.config.length), default=self.config.lengths[0]
        )

    @cached_property
    def budget(self) -> int:
        """Tokens of each training: what was given, or what the slowest of the four reads in config.minutes."""
        config, file = self.config, self.output / "budget.json"
        if config.tokens is not None:
            return config.tokens
        if not file.is_file():
            speeds = {system.name: self._speed(system) for system in config.systems() if not system.ablation}
            for name, speed in speeds.items():
                self.tell(f"{name}: {speed:,.0f} tokens/s at its longest rows")
            slowest = min(speeds.values())
            tokens = max(int(slowest * 60 * config.minutes), config.tokens_per_step * len(STAGES))
            write_whole(
                file, json.dumps({"tokens": tokens, "minutes": config.minutes, "tokens_per_second": speeds}) + "\n"
            )
            self.tell(f"{tokens / 1e6:,.1f} M tokens each: {config.minutes:g} minutes for the slowest")
        return json.loads(file.read_text())["tokens"]

    def model(self, system: System) -> Any:
        """Untrained, the same for the same seed."""
        config = self.config
        torch.manual_seed(config.seed)
        sizes: dict[str, Any] = {
            "vocab_size": len(TEXT8_ALPHABET),
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "intermediate_size": 4 * config.width,
        }
        if system.kind == "longnet":
            lengths, dilations = zip(*config.segments, strict=True)
            return LongNetForCausalLM(LongNetConfig.tiny(**sizes, segment_lengths=lengths, dilations=dilations))
        return LongformerForCausalLM(
            LongformerLMConfig.tiny(**sizes, windows=system.windows, dilations=system.dilations)
        )

    def curriculum(self, system: System) -> Curriculum:
        """The same learning rates over the same steps for all; rows and windows grow only where they are staged."""
        return tiny_stages(
            tokens=round(system.share * self.budget),
            tokens_per_step=self.config.tokens_per_step,
            length=system.length,
            learning_rate=self.config.learning_rate,
            windows=system.windows,
            shares=STAGES,
            growing=system.staged,
        )

    def training(self, system: System) -> LanguageTraining:
        curriculum = self.curriculum(system)
        return LanguageTraining(
            output=str(self.output / system.folder),
            curriculum=curriculum,
            weight_decay=0.01,
            dev_length=min(system.length, 2048, self.config.length),
            evaluate_steps=max(1, curriculum.steps // 10),
            save_steps=max(1, curriculum.steps // 20),
            log_steps=max(1, curriculum.steps // 100),
            dev_tokens=8 * self.config.tokens_per_step,
            bf16=self.config.bf16,
            seed=self.config.seed,
        )

    def trained(self, system: System) -> TrainedLanguageModel:
        """The finished run of a system, trained now if it is not there."""
        self.tell(f"--- {system.name}")
        return train_language_model(self.model(system), self.tokens, self.training(system), tell=self.tell)

    def row(self, system: System, trained: TrainedLanguageModel) -> Row:
        """A trained system's row; evaluated once, and kept in scores.json."""
        config, file = self.config, self.output / system.folder / "scores.json"
        kind: Any = LongNetForCausalLM if system.kind == "longnet" else LongformerForCausalLM
        model = kind.from_pretrained(trained.model).eval()
        if not file.is_file():
            test, bits = self.tokens.splits["test"], {}
            for length in config.lengths:
                operations = forward_operations(model, length) * length * len(self.ends)
                too_long = length > system.length and operations > MOST_OPERATIONS
                if too_long or (system.ablation and length != self._ablation_length):
                    continue
                found = bits_of_windows(model, test, self.ends, length=length, scored=config.scored, bf16=config.bf16)
                bits[length] = (found / config.scored).tolist()
            write_whole(file, json.dumps(bits) + "\n")
        stretches = {int(length): np.array(values) for length, values in json.loads(file.read_text()).items()}
        gains = stretches[min(stretches)] - stretches[max(stretches)]
        curriculum = self.curriculum(system)
        return Row(
            name=system.name,
            ablation=system.ablation,
            parameters=model.num_parameters(),
            tokens=trained.tokens,
            length=system.length,
            bits={
                length: float(stretches[length].mean()) if length in stretches else None for length in config.lengths
            },
            gain=float(gains.mean()),
            gain_error=float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else 0.0,
            dev_bits=trained.bits,
            tokens_per_second=trained.tokens_per_second,
            minutes=trained.tokens / trained.tokens_per_second / 60,
            peak_memory_gib=trained.peak_memory_gib,
            operations=sum(row["operations"] for row in curriculum.table(model)),
        )

    def references(self) -> list[dict[str, Any]]:
        """What compressors make of the whole test split."""
        file = self.output / "references.json"
        if not file.is_file():
            texts = find_texts(self.output / "text")
            test = texts.read("test")
            self.tell("compressors on the test split")
            found = compressors(test, units=len(test), primer=texts.read("train"))
            write_whole(file, json.dumps([asdict(row) for row in found], indent=2) + "\n")
        return json.loads(file.read_text())

    def _speed(self, system: System) -> float:
        """Tokens a second of a few training steps at the system's longest rows."""
        model, config = self.model(system), self.config
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tokens = self.tokens.splits["train"]
        if len(tokens) < config.tokens_per_step:
            raise ValueError(
                f"the training split has {len(tokens):,} characters and a step reads {config.tokens_per_step:,}"
            )
        ids = torch.from_numpy(np.array(tokens[: config.tokens_per_step], np.int64)).reshape(-1, system.length)
        bf16 = uses_bf16(config.bf16, model.device)
        times = []
        for _ in range(MEASURED_STEPS):
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - began)
        return config.tokens_per_step / float(np.median(times[1:]))
