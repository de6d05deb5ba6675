"""Training of the evidence reader on transformers.Trainer: an encoder of 512 tokens learns to find passages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, Trainer

from longspan.inference.evidence import uses_bf16
from longspan.inference.windows import select_disjoint
from longspan.models.convert import to_long
from longspan.models.evidence import LongspanForEvidence
from longspan.training.evidence_rows import (
    Array,
    Articles,
    EvidenceRow,
    interval_iou,
    load_articles,
    load_rows,
    load_xquad_rows,
)
from longspan.training.packing import PackedRow, batch_rows, invent_question, natural_row, opening_row, pack_row
from longspan.training.reading import (
    HIT_IOU,
    LONGEST_QUESTION,
    Document,
    calibration_error,
    fit_calibration,
    hits,
    predict,
    read_held_out,
    summarize,
    tokenize_question,
)
from longspan.training.runs import newest_checkpoint
from longspan.training.settings import trainer_arguments

# Share of the rows from each source at the first and at the last step. There are few questions of the kind that the
# reader is for, so the plentiful others teach first.
MIXTURE = {
    "boolq_articles": (0.40, 0.90),
    "invented": (0.25, 0.0),
    "fever": (0.17, 0.07),
    "multirc": (0.08, 0.03),
    "xquad": (0.10, 0.0),
}
# From this share of the steps on most rows are whole stretches of text, twice as long: what it will be asked to read.
NATURAL_FROM, NATURAL_FRACTION = 0.4, 0.75
LATE_COPIES = {"boolq_articles": 2}  # a question whose evidence stands past word 380 comes twice an epoch
SCORE_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # tried for a passage's best stretch and for its words
MASKED_FRACTION = 0.1  # of the document tokens, against learning the few articles by heart


@dataclass(frozen=True, kw_only=True)
class ReaderTraining:
    """Everything that decides a training run of the reader.

    base: directory or hub name of a BERT-like sentence encoder. data: folder with boolq_articles, fever, multirc and
    xquad.
    output: receives the token cache, the checkpoints and at last the model; a run that finds checkpoints there goes
    on from the newest.
    batch: rows a step, of tokens_per_row tokens each, and later of up to twice as many. scorer_rate: multiple of
    learning_rate for the scorers.
    held_out: training questions kept for model selection and calibration, whole articles at a time; monitored of them
    are read every evaluate_steps; the last `calibrated` of them weigh the parts of a score and fit the probabilities.
    trained_share: the result lies between the weights before training (0) and after it (1); less than 1 keeps more of
    what the base knows of other texts (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models").
    bf16: None for where the processor has instructions for it. threads: None leaves torch's setting.
    """

    base: str
    data: str
    output: str
    steps: int = 1500
    batch: int = 8
    tokens_per_row: int = 1024
    learning_rate: float = 1e-4
    scorer_rate: float = 5.0
    trained_share: float = 1.0
    warmup_steps: int = 40
    held_out: int = 250
    monitored: int = 100
    calibrated: int = 125
    evaluate_steps: int = 400
    save_steps: int = 50
    log_steps: int = 20
    bf16: bool | None = None
    threads: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "held_out", "evaluate_steps", "save_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.trained_share <= 1:
            raise ValueError(f"trained_share must lie between 0 and 1; got {self.trained_share}")
        if self.calibrated < 2:
            raise ValueError(f"calibrated must be at least 2, for two halves; got {self.calibrated}")
        if self.tokens_per_row < 4 * LONGEST_QUESTION:
            raise ValueError(f"tokens_per_row must be at least {4 * LONGEST_QUESTION}; got {self.tokens_per_row}")


class TrainingRows(torch.utils.data.Dataset):
    """Row i of a run: a question and a packed document. Pure in (seed, i), so a resumed run sees the same."""

    def __init__(
        self,
        articles: Articles,
        rows: dict[str, list[EvidenceRow]],
        allowed: Array,
        tokenizer: Any,
        config: ReaderTraining,
    ):
        self.articles, self.rows, self.allowed, self.tokenizer, self.config = articles, rows, allowed, tokenizer, config
        self.inventive = np.array([i for i in allowed if articles.names[i].startswith("boolq_articles/")])
        sources = [source for source in MIXTURE if source == "invented" or rows.get(source)]
        size = config.steps * config.batch
        rng = np.random.default_rng((config.seed, size))
        shares = np.array([MIXTURE[source] for source in sources])
        progress = np.linspace(0, 1, size)[:, None]
        shares = shares[None, :, 0] * (1 - progress) + shares[None, :, 1] * progress
        cumulative = np.cumsum(shares / shares.sum(1, keepdims=True), 1)
        chosen = (rng.random(size)[:, None] > cumulative).sum(1).clip(max=len(sources) - 1)
        self.source = [sources[number] for number in chosen]
        self.choice = np.zeros(size, np.int64)
        for number, source in enumerate(sources):
            mine = np.nonzero(chosen == number)[0]
            if source == "invented":
                continue
            late = [i for i, row in enumerate(rows[source]) if row.starts_late]
            epoch = np.array([*range(len(rows[source])), *late * (LATE_COPIES.get(source, 1) - 1)])
            passes = [rng.permutation(epoch) for _ in range(-(-len(mine) // len(epoch)))]
            self.choice[mine] = np.concatenate(passes)[: len(mine)] if passes else 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Array, PackedRow, int]:
        """(question with its special tokens, packed row, position offset)."""
        rng = np.random.default_rng((self.config.seed, index))
        source = self.source[index]
        if source == "invented":
            made = None
            while made is None:
                article = int(rng.choice(self.inventive))
                made = invent_question(self.articles, article, rng)
            question, evidence = made
        else:
            row = self.rows[source][self.choice[index]]
            article, question, evidence = row.article, row.question, row.evidence
        question_ids = tokenize_question(self.tokenizer, question)
        room = self.config.tokens_per_row - len(question_ids)
        if source in ("fever", "multirc"):
            row = opening_row(self.articles, article, evidence, room)
        elif index >= NATURAL_FROM * len(self) and rng.random() < NATURAL_FRACTION:
            room += self.config.tokens_per_row
            row = natural_row(self.articles, article, evidence, self.inventive, room, rng)
        else:
            row = pack_row(self.articles, article, evidence, question_ids[1:-1], self.allowed, room, rng)
        document = row.document_ids.astype(np.int64)
        masked = rng.random(len(document)) < MASKED_FRACTION
        if source == "invented":  # its words come from the text: hide some of them there, or matching words would do
            masked |= np.isin(document, question_ids) & (rng.random(len(document)) < rng.uniform(0, 0.7))
        document[masked] = self.tokenizer.mask_token_id
        return question_ids, row._replace(document_ids=document), int(rng.integers(0, 512))


class ReaderTrainer(Trainer):
    """Trainer that keeps the rows' order, logs hits and speed, and evaluates on whole documents."""

    def __init__(self, *, monitor: Callable[[], dict[str, float | None]], **kwargs):
        super().__init__(**kwargs)
        self.monitor = monitor
        self.hits, self.rows_seen, self.tokens_seen, self.since = 0.0, 0, 0, time.perf_counter()

    def _get_train_sampler(self, train_dataset=None):
        assert isinstance(self.train_dataset, TrainingRows)
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        best = outputs.window_scores.detach().argmax(1, keepdim=True)
        self.hits += float(inputs["window_labels"].gather(1, best).sum())
        self.rows_seen += len(best)
        self.tokens_seen += int(inputs["token_mask"].sum())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.rows_seen:
            logs["top1"] = round(self.hits / self.rows_seen, 4)
            logs["tokens_per_second"] = round(self.tokens_seen / (time.perf_counter() - self.since))
            self.hits, self.rows_seen, self.tokens_seen, self.since = 0.0, 0, 0, time.perf_counter()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        found = self.monitor().items()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found if value is not None}
        self.log(metrics)
        self.since = time.perf_counter()
        return metrics


def train_reader(config: ReaderTraining, *, base_model: LongspanForEvidence | None = None) -> Path:
    """Trains, or goes on with, the run that `config` describes; the directory of the finished model.

    base_model: an untrained reader to start from in place of the converted `config.base`.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    output = Path(config.output)
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    articles = load_articles(config.data, output / "cache", tokenizer)
    rows, held_out, allowed = split_rows(config, articles)
    torch.manual_seed(config.seed)  # of the scorers: a resumed run starts from the same ones
    model = untrained_reader(config.base) if base_model is None else base_model
    for parameter in model.longspan.embeddings.parameters():
        parameter.requires_grad_(False)
    untrained = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    scorers = [*model.window_scorer.parameters(), *model.sentence_scorer.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.longspan.encoder.parameters()), "lr": config.learning_rate},
            {"params": scorers, "lr": config.learning_rate * config.scorer_rate},
        ],
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )
    pad_id = tokenizer.pad_token_id

    def collate(examples: list[tuple[Array, PackedRow, int]]) -> dict[str, Tensor]:
        batch = batch_rows([(question, row) for question, row, _ in examples], pad_id)
        batch["position_offsets"] = np.array([offset for _, _, offset in examples])
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    read = partial(read_held_out, model, articles, tokenizer, bf16=config.bf16, fillers=allowed)

    def monitor() -> dict[str, float | None]:
        found = [
            (hits(windows[select_disjoint(windows, model.weigh(parts), 3)], document.evidence), row.starts_late)
            for row, document, windows, parts in read(held_out[: config.monitored], conditions=("as_is",))
        ]
        return summarize([hit for hit, _ in found], [late for _, late in found])

    trainer = ReaderTrainer(
        model=model,
        monitor=monitor,
        args=trainer_arguments(
            output,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            max_grad_norm=1.0,
            bf16=uses_bf16(config.bf16, model.device),
            logging_steps=config.log_steps,
            eval_strategy="steps",
            eval_steps=config.evaluate_steps,
            save_steps=config.save_steps,
            disable_tqdm=True,
            seed=config.seed,
        ),
        train_dataset=TrainingRows(articles, rows, allowed, tokenizer, config),
        eval_dataset=held_out,
        data_collator=collate,
        optimizers=(optimizer, None),
    )
    newest = newest_checkpoint(output)
    trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.lerp_(untrained[name], 1 - config.trained_share)
    error = calibrate(model, read(held_out[-config.calibrated :], conditions=("as_is", "buried")))
    model.config.training = asdict(config) | {"base": Path(config.base).name, "data": None, "output": None}
    model.config.training["calibration_error"] = round(error, 4)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    return output / "model"


def calibrate(model: Any, readings: Iterable[tuple[EvidenceRow, Document, Array, Array]]) -> float:
    """Fits how a reader weighs the parts of its scores, then its probabilities, and sets both; the calibration error.

    The weights are those of SCORE_WEIGHTS by which most first passages and most first three hit the evidence. The
    probabilities' (`LongspanForEvidence.passage_probability`) are fitted on the three best passages of each held-out
    document. The error is that of two halves, each predicted by the weights of the other.
    """
    read = [
        (windows, parts, interval_iou(windows, document.evidence).max(1) >= HIT_IOU)
        for _, document, windows, parts in readings
    ]

    def hits_with(weights: tuple[float, ...]) -> int:
        model.config.score_weights = list(weights)
        found = (is_hit[select_disjoint(windows, model.weigh(parts), 3)] for windows, parts, is_hit in read)
        return sum(int(best[0]) + int(best.any()) for best in found)

    model.config.score_weights = list(max(product(SCORE_WEIGHTS, repeat=2), key=hits_with))
    features, labels = [], []
    for windows, parts, is_hit in read:
        scores = model.weigh(parts)
        best = select_disjoint(windows, scores, 3)
        shares = scores - np.logaddexp.reduce(scores)
        features.append(np.stack((shares[best], scores[best]), 1))
        labels.append(is_hit[best])
    middle = len(features) // 2
    halves = [(np.vstack(features[part]), np.hstack(labels[part])) for part in (slice(middle), slice(middle, None))]
    predicted = [predict(fit_calibration(*halves[1 - half]), halves[half][0]) for half in (0, 1)]
    model.config.calibration = fit_calibration(np.vstack(features), np.hstack(labels))
    return calibration_error(np.hstack(predicted), np.hstack(labels))


def split_rows(
    config: ReaderTraining, articles: Articles
) -> tuple[dict[str, list[EvidenceRow]], list[EvidenceRow], Array]:
    """(training rows by source, held-out rows, articles allowed in any role).

    No evaluation article, nor a copy of one, is among them; no article of a held-out row in the first and the last.
    """
    boolq = [row for row in load_rows(config.data, articles, "boolq_articles", "train") if _is_clean(row, articles)]
    rng = np.random.default_rng(0)  # the same for every seed: a run may start from the weights of another
    unseen: set[int] = set()
    held_out: list[EvidenceRow] = []
    by_article: dict[int, list[EvidenceRow]] = {}
    for row in boolq:
        by_article.setdefault(row.article, []).append(row)
    for article in rng.permutation(sorted(by_article)):
        if len(held_out) >= min(config.held_out, len(boolq) // 2):
            break
        unseen.add(int(article))
        held_out += by_article[int(article)]
    rows = {"boolq_articles": [row for row in boolq if row.article not in unseen], "xquad": []}
    for source in ("fever", "multirc"):
        rows[source] = [row for split in ("val", "test") for row in load_rows(config.data, articles, source, split)]
    rows["xquad"] = load_xquad_rows(config.data, articles)
    rows = {source: [row for row in kept if _is_clean(row, articles)] for source, kept in rows.items()}
    allowed = np.array([i for i in np.nonzero(~articles.repeats_dev)[0] if int(i) not in unseen])
    dev = {row.article for row in load_rows(config.data, articles, "boolq_articles", "dev")}
    assert not dev & ({int(i) for i in allowed} | {row.article for kept in rows.values() for row in kept} | unseen)
    return rows, held_out, allowed


def untrained_reader(base: str) -> LongspanForEvidence:
    """A reader from an encoder of 512 tokens: windows of 128 tokens a side, periodic positions, cosine scorers."""
    long = to_long(AutoModel.from_pretrained(base, add_pooling_layer=False), max_tokens=None, window=256)
    # Masked tokens take the place of dropout, which would cost a third of the speed inside attention.
    long.config.embeddings["dropout"] = 0.0
    long.config.encoder |= {"dropout": 0.0, "attention_dropout": 0.0}
    model = LongspanForEvidence(long.config)
    model.longspan.load_state_dict(long.state_dict())
    return model


def _is_clean(row: EvidenceRow, articles: Articles) -> bool:
    return not articles.repeats_dev[row.article]
