"""Labeled batches for tiny classifiers, and models whose parts differ enough to be told apart."""

from __future__ import annotations

import time

import torch
from tests.models.tiny import VOCABULARY, tiny_model

from longspan.compression.distill import Distillation, Rows, distill
from longspan.compression.distillation_loss import DistillationLoss
from longspan.models import LongspanForSequenceClassification
from longspan.models.checkpoints import from_hugging_face, translate_config


def tiny_features(count=12, *, labels=3, seed=0, longest=20):
    """Rows of 5 to `longest` random token ids with a label that their second token decides."""
    generator = torch.Generator().manual_seed(seed)
    features = []
    for _ in range(count):
        length = int(torch.randint(5, longest + 1, (), generator=generator))
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        features.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids[1] % labels})
    return features


def pad(features, padding=0):
    """The features as a batch, padded on the right."""
    longest = max(len(row["input_ids"]) for row in features)
    batch = {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in features])
        for name, fill in (("input_ids", padding), ("attention_mask", 0))
    }
    if "labels" in features[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in features])
    return batch


def tiny_batches(count=3, *, padding=0, seed=0):
    features = tiny_features(4 * count, seed=seed)
    return [pad(features[start : start + 4], padding) for start in range(0, len(features), 4)]


def tiny_classifier(family="bert", *, seed=0, **changes):
    """A stock classifier of 3 labels whose weights are large enough that every part of it counts."""
    fields = {"num_labels": 3, "n_heads" if family == "distilbert" else "num_attention_heads": 4}
    model = tiny_model(family, "sequence_classification", seed=seed, **fields | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model.eval()


def tiny_ours(family="bert", **changes):
    theirs = tiny_classifier(family, **changes)
    config = translate_config(theirs.config)
    ours = LongspanForSequenceClassification(config)
    ours.load_state_dict(from_hugging_face(theirs.state_dict(), config, "sequence_classification"))
    return ours.eval()


def distill_with_all_there_is_to_resume(folder, seconds_each=0.0):
    """A run with dropout, projections and a metric; it waits a little before each evaluation."""

    def judge(model):
        time.sleep(seconds_each)
        return {"weight": float(model.classifier.weight.sum())}

    settings = Distillation(
        epochs=3,
        batch=4,
        learning_rate=1e-3,
        bf16=False,
        loss=DistillationLoss(hard_labels=0.5, hidden_states=1),
        save_steps=2,
        evaluate_steps=3,
    )
    student = tiny_ours("bert", hidden_size=16, num_hidden_layers=1, seed=1, hidden_dropout_prob=0.1)
    distill(tiny_classifier(), student, Rows(tiny_features(22), pad), folder, settings, evaluate=judge)
