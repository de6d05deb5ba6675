import json

import pytest
import torch
from tests.compression.small import pad, tiny_batches, tiny_classifier, tiny_features

from longspan.compression.distill import Distillation, Rows
from longspan.compression.distillation_loss import DistillationLoss
from longspan.compression.pipeline import CompressionData, Distill, Prune, Quantize, Train, compress
from longspan.compression.prune import Pruning
from longspan.models import LongspanForSequenceClassification
from longspan.models.packed import PackedEncoder

DATA = CompressionData(rows=Rows(tiny_features(8), pad), calibration=tiny_batches(2))
SETTINGS = Distillation(epochs=1, batch=4, bf16=False)
STEPS = (
    Distill(settings=SETTINGS, layers=2),
    Prune(pruning=Pruning(heads=2, ffn=11)),
    Distill(settings=SETTINGS),
    Quantize(),
)


@torch.no_grad()
def logits(model):
    (batch,) = tiny_batches(1)
    del batch["labels"]
    return model(**batch).logits


def test_steps_follow_each_other_and_report(tmp_path):
    asked = []

    def evaluate(model):
        asked.append(type(model).__name__)
        return {"first": float(logits(model)[0, 0])}

    done = compress(tiny_classifier(), STEPS, DATA, tmp_path, evaluate=evaluate)
    assert [row.step for row in done.rows] == ["start", "distill", "prune", "distill", "quantize"]
    assert asked == ["BertForSequenceClassification"] + ["LongspanForSequenceClassification"] * 4
    sizes = [row.parameters for row in done.rows]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3] == sizes[4]
    assert done.rows[4].bytes < done.rows[3].bytes
    assert isinstance(done.model.longspan.encoder, PackedEncoder)
    assert [(b.heads, b.ffn_width) for b in done.model.config.encoder_config.blocks] == [(2, 11)] * 2
    assert json.loads((tmp_path / "report.json").read_text())[4]["bytes"] == done.rows[4].bytes
    assert "quantize" in str(done) and "first" in str(done)
    loaded = LongspanForSequenceClassification.from_pretrained(done.saved).eval()
    assert torch.equal(logits(loaded), logits(done.model))

    again = compress(tiny_classifier(), STEPS, DATA, tmp_path, evaluate=evaluate)
    assert len(asked) == 5
    assert torch.equal(logits(again.model), logits(done.model))
    assert [(row.parameters, row.metrics) for row in again.rows] == [(row.parameters, row.metrics) for row in done.rows]


def test_a_broken_run_goes_on(tmp_path):
    class Broken(Exception):
        pass

    def breaks(model, folder):
        raise Broken

    def works(model, folder):
        model.save_pretrained(folder / "model")

    with pytest.raises(Broken):
        compress(tiny_classifier(), [STEPS[1], Train(run=breaks)], DATA, tmp_path)
    written = (tmp_path / "1-prune" / "model" / "model.safetensors").stat().st_mtime_ns
    done = compress(tiny_classifier(), [STEPS[1], Train(run=works)], DATA, tmp_path)
    assert (tmp_path / "1-prune" / "model" / "model.safetensors").stat().st_mtime_ns == written
    assert [row.step for row in done.rows] == ["start", "prune", "train"]
    with pytest.raises(ValueError, match="holds a run with other arguments"):
        compress(tiny_classifier(), [Prune(pruning=Pruning(heads=1))], DATA, tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="there are no steps"):
        compress(tiny_classifier(), [], DATA, tmp_path)
    with pytest.raises(ValueError, match="distillation needs rows"):
        compress(tiny_classifier(), [Distill(layers=1)], CompressionData(), tmp_path)
    with pytest.raises(ValueError, match="calibration split holds no rows"):
        compress(tiny_classifier(), [STEPS[1]], CompressionData(), tmp_path)
    with pytest.raises(ValueError, match="relation_heads"):
        settings = Distillation(epochs=1, batch=4, loss=DistillationLoss(relations=1, relation_heads=7))
        compress(tiny_classifier(), [Distill(settings=settings, layers=1)], DATA, tmp_path)
