import pytest
import torch
import torch.nn.functional as F
from tests.compression.small import tiny_batches, tiny_classifier, tiny_ours
from torch import nn

from longspan.compression.distillation_loss import DistillationLoss, uniform_layers
from longspan.compression.readings import read


def random_readings(names, widths=(6,), seed=0, shape=(3, 5)):
    torch.manual_seed(seed)
    return {name: torch.randn(*shape, widths[0]) for name in names} | {"logits": torch.randn(shape[0], 4)}


def terms(loss, student, teacher, mask=None, pairs=(), projections=None, own_loss=None):
    mask = torch.ones(3, 5, dtype=torch.bool) if mask is None else mask
    return loss.terms(
        student, teacher, token_mask=mask, pairs=pairs, projections=projections or nn.ModuleDict(), own_loss=own_loss
    )


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_fastformers_loss_is_its_formula(distance):
    """loss_kd + state_loss_ratio * (embeddings + last layer), as run_superglue.py computes it."""
    names = ["hidden.0", "hidden.2", "hidden.6"]
    student, teacher = random_readings(names), random_readings(names, seed=1)
    log = torch.log_softmax(student["logits"], -1)
    expected = torch.mean(torch.sum(-torch.softmax(teacher["logits"], -1) * log, -1))
    for low, high in (("hidden.0", "hidden.0"), ("hidden.2", "hidden.6")):
        if distance == "cosine":
            expected = expected + 0.1 * (1.0 - F.cosine_similarity(student[low], teacher[high], dim=2)).mean()
        else:
            expected = expected + 0.1 * torch.mean((student[low] - teacher[high]) ** 2)
    loss = DistillationLoss.fastformers(hidden_distance=distance)
    pairs = loss.layers(2, 6)
    assert pairs == ((2, 6),)
    assert loss.wanted(pairs) == (["hidden.0", "hidden.2"], ["hidden.0", "hidden.6"])
    torch.testing.assert_close(sum(terms(loss, student, teacher, pairs=pairs).values()), expected)


def test_the_gradient_keeps_its_size_when_the_temperature_rises():
    """T squared makes up for the flatter distributions (arXiv 1503.02531, section 2)."""
    student, teacher = random_readings([]), random_readings([], seed=1)
    sizes = []
    for temperature in (10.0, 100.0):
        logits = student["logits"].clone().requires_grad_()
        sum(terms(DistillationLoss(temperature=temperature), {"logits": logits}, teacher).values()).backward()
        sizes.append(float(logits.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)


def test_equal_logits_have_no_gradient():
    teacher = random_readings([])
    logits = teacher["logits"].clone().requires_grad_()
    terms(DistillationLoss(), {"logits": logits}, teacher)["logits"].backward()
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_padding_counts_in_no_term(distance):
    names = ["hidden.0", "hidden.1", "query.1", "key.1", "value.1"]
    student, teacher = random_readings(names), random_readings(names, seed=1)
    for readings in (student, teacher):
        readings["start_logits"], readings["end_logits"] = torch.randn(3, 5), torch.randn(3, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]]).bool()
    loss = DistillationLoss(
        hidden_states=1, embeddings=1, relations=1, relation_heads=2, hidden_distance=distance, layer_map=((1, 1),)
    )
    for logits in ("logits", "start_logits"):
        if logits == "start_logits":
            del student["logits"], teacher["logits"]
        before = terms(loss, student, teacher, mask, loss.layers(1, 1))
        other = {name: value.clone() for name, value in student.items()}
        for name, value in other.items():
            if name != "logits":
                value[~mask] = 1e4
                value.requires_grad_()
        after = terms(loss, other, teacher, mask, loss.layers(1, 1))
        assert before.keys() == after.keys() == {"logits", "hidden_states", "embeddings", "relations"}
        for name in before:
            torch.testing.assert_close(before[name], after[name])
        sum(after.values()).backward()
        for name in (*names, *([] if logits == "logits" else ["start_logits"])):
            assert other[name].grad.isfinite().all()
            assert not other[name].grad[~mask].any()


def test_relations_are_minilms():
    """KL of softmax(A A^T / sqrt(d)) of the student from that of the teacher, in parts of equal number."""
    names = ["query.1", "key.1", "value.1"]
    student, teacher = random_readings(names, (4,)), random_readings(names, (8,), seed=1)
    loss = DistillationLoss(logits=0, relations=2.0, relation_heads=2, layer_map="last")
    expected = 0
    for name in names:
        for row in range(3):
            for head in range(2):
                s, t = student[name][row][:, 2 * head : 2 * head + 2], teacher[name][row][:, 4 * head : 4 * head + 4]
                p, q = torch.softmax(t @ t.T / 2, -1), torch.softmax(s @ s.T / 2**0.5, -1)
                expected = expected + (p * (p / q).log()).sum() / (3 * 3 * 2 * 5)
    torch.testing.assert_close(terms(loss, student, teacher, pairs=((1, 1),))["relations"], 2 * expected)
    with pytest.raises(ValueError, match=r"relation_heads=3 must divide.*one has"):
        wrong = DistillationLoss(relations=1, relation_heads=3, layer_map="last")
        terms(wrong, student, teacher, pairs=((1, 1),))


def test_one_label_is_a_number_to_be_met():
    student, teacher = {"logits": torch.tensor([[1.0], [2.0]])}, {"logits": torch.tensor([[0.0], [4.0]])}
    assert terms(DistillationLoss(), student, teacher, torch.ones(2, 1, dtype=torch.bool))["logits"] == 2.5


def test_layers_are_mapped():
    assert uniform_layers(3, 12) == [4, 8, 12]
    assert uniform_layers(4, 6) == [2, 3, 5, 6]
    assert uniform_layers(5, 5) == [1, 2, 3, 4, 5]
    assert DistillationLoss(hidden_states=1).layers(2, 6) == ((1, 3), (2, 6))
    assert DistillationLoss(layer_map=((1, 5), (2, 6))).layers(2, 6) == ((1, 5), (2, 6))
    with pytest.raises(ValueError, match="pairs student layer 3 with teacher layer 6; the student has layers 1 to 2"):
        DistillationLoss(layer_map=((3, 6),)).layers(2, 6)
    with pytest.raises(ValueError, match=r"1 to 2 student layers.*got 3"):
        DistillationLoss().layers(3, 2)


def test_widths_that_differ_get_a_projection():
    loss = DistillationLoss(hidden_states=1, embeddings=1)
    made = loss.projections(loss.layers(2, 6), 8, 12)
    assert {name: tuple(layer.weight.shape) for name, layer in made.items()} == dict.fromkeys("012", (12, 8))
    assert not loss.projections(loss.layers(2, 6), 12, 12)
    assert not DistillationLoss(relations=1).projections(((2, 6),), 8, 12)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_readings_of_stock_models_and_ours_agree(family):
    (batch,) = tiny_batches(1, padding=1 if family == "roberta" else 0)
    del batch["labels"]
    wanted = ["hidden.0", "hidden.2", "query.1", "key.2", "value.3"]
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        theirs, _ = read(tiny_classifier(family), batch, wanted)
        ours, _ = read(tiny_ours(family), batch, wanted)
    assert theirs.keys() == ours.keys() == {*wanted, "logits"}
    for name in wanted:
        torch.testing.assert_close(theirs[name][mask], ours[name][mask], rtol=1e-3, atol=1e-3)


def test_layers_that_are_not_there_cannot_be_read():
    (batch,) = tiny_batches(1)
    with pytest.raises(ValueError, match=r"hidden\.4: BertForSequenceClassification has 3 layers"):
        read(tiny_classifier(), batch, ["hidden.4"])
    with pytest.raises(ValueError, match=r"query\.4: LongspanForSequenceClassification has 3 layers"):
        read(tiny_ours(), batch, ["query.4"])
    with pytest.raises(NotImplementedError, match="projections of 0 of 4 layers in ModernBert"):
        read(tiny_classifier("modernbert"), batch, ["query.1"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logits": 0}, "every term has weight 0"),
        ({"hidden_states": -1}, "hidden_states must be a weight of 0 or more"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"hidden_distance": "l1"}, "'mse' or 'cosine'"),
        ({"layer_map": "first"}, "'uniform', 'last' or pairs"),
        ({"layer_map": ()}, "'uniform', 'last' or pairs"),
        ({"relation_heads": 0}, "relation_heads must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**fields)
