from dataclasses import replace

import pytest
import torch
from tests.compression.small import tiny_batches, tiny_classifier, tiny_ours

from longspan.compression.cost import Costs, LayerCost, measure_costs
from longspan.compression.importance import Importance, measure_importance
from longspan.compression.prune import Kept, Pruning, choose, cut, prune
from longspan.compression.students import student_of
from longspan.models import LongspanForSequenceClassification, LongspanModel
from longspan.models.convert import as_ours
from longspan.models.plug_in import accelerate

KEPT_3 = Kept(heads=((0, 3), (2,), (0, 1, 2)), units=((1, 2, 39), tuple(range(0, 40, 3)), (5,)))
KEPT_4 = Kept(heads=(*KEPT_3.heads, (1, 3)), units=(*KEPT_3.units, tuple(range(7, 30))))


def mask(model, kept):
    """The model with every other head and unit multiplied by 0."""
    for block, heads, units in zip(model.base_model.encoder.blocks, *kept, strict=True):
        of_heads = torch.zeros(block.block.heads)
        of_heads[list(heads)] = 1
        of_units = torch.zeros(block.block.ffn_width)
        of_units[list(units)] = 1
        columns = of_heads.repeat_interleave(block.block.head_width)
        block.attention.out.register_forward_pre_hook(lambda _, args, m=columns: (args[0] * m,))
        block.ffn_out.register_forward_pre_hook(lambda _, args, m=of_units: (args[0] * m,))
    return model


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "longformer", "modernbert"])
def test_a_pruned_model_equals_the_masked_one(family):
    model = tiny_ours(family)
    kept = KEPT_4 if family == "modernbert" else KEPT_3
    small = cut(model, kept)
    assert [(block.heads, block.ffn_width) for block in small.config.encoder_config.blocks] == kept.shape
    for batch in tiny_batches(padding=1 if family in ("roberta", "longformer") else 0):
        if family == "longformer":  # two global tokens, in other places in each row
            batch["global_attention_mask"] = torch.zeros_like(batch["input_ids"])
            batch["global_attention_mask"][:, 0] = 1
            batch["global_attention_mask"][1:, 3] = 1
        with torch.no_grad():
            pruned = small(**batch).logits
            whole = model(**batch).logits
            masked = mask(tiny_ours(family), kept)(**batch).logits
        torch.testing.assert_close(pruned, masked, rtol=1e-5, atol=1e-5)
        assert (pruned - whole).abs().max() > 1e-3


def test_a_pruned_model_is_saved_and_loaded(tmp_path):
    small = cut(tiny_ours("longformer"), KEPT_3)
    small.save_pretrained(tmp_path)
    loaded = LongspanForSequenceClassification.from_pretrained(tmp_path)
    (batch,) = tiny_batches(1, padding=1)
    assert torch.equal(loaded(**batch).logits, small(**batch).logits)
    assert small.num_parameters() < tiny_ours("longformer").num_parameters()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("family", ["bert", "longformer", "modernbert"])
def test_a_pruned_model_packs(family, precision):
    small = cut(tiny_ours(family), KEPT_4 if family == "modernbert" else KEPT_3)
    (batch,) = tiny_batches(1, padding=1 if family == "longformer" else 0)
    del batch["labels"]
    with torch.no_grad():
        exact = small(**batch).logits
        packed = accelerate(small, precision)(**batch).logits
    error = float((packed - exact).norm() / exact.norm())
    assert error < {"fp32": 1e-4, "bf16": 0.05, "int8": 0.1}[precision]


def test_uniform_keeps_the_best_of_every_layer():
    importance = Importance(
        heads=(torch.tensor([1.0, 3, 2]),) * 2, units=(torch.arange(10.0), torch.arange(10.0).flip(0))
    )
    kept = choose(importance, Pruning(heads=2, ffn=3))
    assert kept == Kept(heads=((1, 2), (1, 2)), units=((7, 8, 9), (0, 1, 2)))


def test_global_keeps_the_best_of_all_layers_and_some_of_each():
    importance = Importance(
        heads=(torch.tensor([9.0, 8, 7, 6]), torch.tensor([1.0, 2, 3, 4])),
        units=(torch.arange(20.0), torch.arange(20.0) / 100),
    )
    kept = choose(importance, Pruning(heads=2, ffn=12, layers="global"))
    assert kept.heads == ((0, 1, 2), (3,))
    assert kept.units == (tuple(range(4, 20)), tuple(range(12, 20)))
    even = choose(importance, Pruning(ffn=10, layers="global", normalize=True))
    assert even.shape == [(4, 10), (4, 10)]


@pytest.mark.parametrize("layers", ["uniform", "global"])
def test_the_last_layer_may_stay_whole(layers):
    importance = Importance(
        heads=tuple(torch.tensor(row) for row in ([9.0, 8, 7, 6], [1.0, 2, 3, 4], [0.0, 0, 0, 0])),
        units=(torch.arange(20.0), torch.arange(20.0) / 100, torch.zeros(20)),
    )
    kept = choose(importance, Pruning(heads=2, ffn=12, layers=layers, keep_last=True))
    below = {"uniform": [(2, 12), (2, 12)], "global": [(3, 16), (1, 8)]}[layers]
    assert kept.shape == [*below, (4, 20)]
    with pytest.raises(ValueError, match="cannot keep 5 heads a layer: the layers have 4, 4; 4 is the most"):
        prune(tiny_ours(), tiny_batches(1), Pruning(heads=5, keep_last=True))
    with pytest.raises(ValueError, match="nothing to prune in a model of one layer"):
        prune(student_of(tiny_ours(), 1), tiny_batches(1), Pruning(heads=1, keep_last=True))


def test_a_speedup_is_met_by_the_costs_given():
    generator = torch.Generator().manual_seed(0)
    importance = Importance(
        heads=tuple(torch.rand(4, generator=generator) for _ in range(3)),
        units=tuple(torch.rand(64, generator=generator) / 10 for _ in range(3)),
    )
    costs = Costs(layers=(LayerCost(fixed=1, per_head=5, per_unit=0.25),) * 3, rest=2)
    full = costs.of([(4, 64)] * 3)
    for speedup in (1, 1.5, 2, 4):
        kept = choose(importance, Pruning(speedup=speedup), costs)
        spent = costs.of(kept.shape)
        assert spent <= full / speedup + 1e-9
        assert full / speedup - spent < 5  # nothing cheaper than a head is left over
    assert choose(importance, Pruning(speedup=1), costs).shape == [(4, 64)] * 3
    with pytest.raises(ValueError, match=r"no pruning makes this model 100 times as fast.*it would be .* times"):
        choose(importance, Pruning(speedup=100), costs)
    with pytest.raises(ValueError, match="chosen by costs"):
        choose(importance, Pruning(speedup=2))


def test_dear_parts_go_first():
    importance = Importance(heads=(torch.ones(4),) * 2, units=(torch.ones(32),) * 2)
    costs = Costs(layers=(LayerCost(per_head=1, per_unit=1), LayerCost(per_head=1, per_unit=3)))
    (first, second) = choose(importance, Pruning(speedup=1.5), costs).shape
    assert first == (4, 32) and second[1] < 32


def test_prune_converts_and_goes_end_to_end():
    theirs = tiny_classifier("bert")
    small = prune(theirs, tiny_batches(), Pruning(heads=2, ffn=16))
    assert [(block.heads, block.ffn_width) for block in small.config.encoder_config.blocks] == [(2, 16)] * 3
    assert small(**tiny_batches(1)[0]).logits.shape == (4, 3)
    assert theirs.config.num_attention_heads == 4
    again = prune(small, tiny_batches(), Pruning(ffn=12, layers="global"))
    assert sum(block.ffn_width for block in again.config.encoder_config.blocks) == 36
    assert {block.heads for block in again.config.encoder_config.blocks} == {2}
    fast = prune(
        small, tiny_batches(), Pruning(speedup=1.1), costs=Costs(layers=(LayerCost(per_head=1, per_unit=1),) * 3)
    )
    assert sum(block.ffn_width + block.heads for block in fast.config.encoder_config.blocks) == 49


def test_the_best_parts_hurt_least():
    """What the scores keep changes the loss less than what they cut."""
    model, batches = tiny_ours(), tiny_batches(4)
    importance = measure_importance(model, batches)
    worst = replace(importance, units=tuple(-scores for scores in importance.units))
    good, bad = (cut(model, choose(scores, Pruning(ffn=20))) for scores in (importance, worst))

    @torch.no_grad()
    def change(other):
        return sum(float((other(**batch).loss - model(**batch).loss).abs()) for batch in batches)

    assert change(good) < change(bad)


def test_an_activation_is_swapped():
    model = tiny_ours()
    small = prune(model, [], Pruning(activation="relu"))
    assert small.config.encoder_config.activation == "relu"
    assert model.config.encoder_config.activation == "gelu"
    (batch,) = tiny_batches(1)
    assert not torch.equal(small(**batch).logits, model(**batch).logits)


def test_a_base_model_without_its_pooler_prunes():
    ours = tiny_ours()
    base = LongspanModel(ours.config, add_pooling_layer=False).eval()
    small = cut(base, KEPT_3)
    assert small.pooler is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing to prune"),
        ({"heads": 0}, "heads must be at least 1 a layer.*got 0"),
        ({"ffn": 0}, "ffn must be at least 1 a layer.*got 0"),
        ({"ffn": 4, "layers": "global"}, "ffn must be at least 8"),
        ({"heads": 2, "speedup": 2.0}, "either speedup"),
        ({"speedup": 0.5}, "number from 1 on"),
        ({"heads": 2, "layers": "all"}, "'uniform' or 'global'"),
        ({"activation": "bent"}, "unknown activation 'bent'"),
        ({"speedup": 2.0, "keep_last": True}, "keep_last is about heads and ffn"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Pruning(**fields)


def test_more_than_there_is_cannot_be_kept():
    with pytest.raises(ValueError, match=r"cannot keep 5 heads a layer: the layers have 4, 4, 4; 4 is the most"):
        prune(tiny_ours(), tiny_batches(1), Pruning(heads=5))
    small = cut(tiny_ours(), KEPT_3)
    with pytest.raises(ValueError, match=r"cannot keep 2 feed-forward units a layer: the layers have 3, 14, 1; 1 is"):
        prune(small, tiny_batches(1), Pruning(ffn=2))
    with pytest.raises(ValueError, match="own encoder, not packed"):
        prune(accelerate(tiny_ours(), "fp32"), tiny_batches(1), Pruning(ffn=2))


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_costs_are_measured(precision):
    model = as_ours(tiny_classifier("longformer"))
    costs = measure_costs(model, rows=2, tokens=16, precision=precision)
    assert len(costs.layers) == 3 and costs.rest > 0
    assert all(layer.per_head > 0 and layer.per_unit > 0 for layer in costs.layers)


def test_of_a_classifiers_last_layer_the_first_token_costs():
    costs = measure_costs(as_ours(tiny_classifier("bert")), rows=1, tokens=4096, precision="fp32")
    assert costs.layers[0] is costs.layers[1] is not costs.layers[2]
    assert costs.layers[2].of(4, 40) < costs.layers[0].of(4, 40) / 2


def test_measured_costs_are_a_line_through_the_times(monkeypatch):
    """The times of layers that take 3 + 5 a head + 2 a unit; then times that tell nothing."""
    model = as_ours(tiny_classifier("bert"))
    shapes = [(2, 20), (2, 40), (4, 20), (4, 40)]
    times = [3.0 + 5 * heads + 2 * units for heads, units in shapes]
    monkeypatch.setattr("longspan.compression.cost._seconds", lambda runs: times[: len(runs)])
    costs = measure_costs(model)
    assert costs.layers[0] is costs.layers[2]
    assert costs.layers[0].of(3, 7) == pytest.approx(3 + 15 + 14)
    monkeypatch.setattr("longspan.compression.cost._seconds", lambda runs: [2.0] * len(runs))
    (layer, *_) = measure_costs(model, tokens=50).layers
    assert layer.of(4, 40) == pytest.approx(2.0)
    # Multiplications for a token: q, k, v, out and two products with 50 tokens; two projections of a unit.
    assert layer.per_head / layer.per_unit == pytest.approx(6 * (4 * 24 + 2 * 50) / (2 * 24))
