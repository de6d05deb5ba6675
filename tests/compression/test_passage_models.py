"""The evidence reader, whose rows are questions with documents and whose answers are scores of passages."""

import pytest
import torch
from tests.models.tiny import tiny_model

from longspan import LongspanForEvidence, to_long
from longspan.compression.distill import Distillation, Rows, distill
from longspan.compression.distillation_loss import DistillationLoss
from longspan.compression.prune import Pruning, prune
from longspan.compression.students import student_of

QUESTION = [2, 9, 30, 17, 3]


@pytest.fixture
def reader():
    long = to_long(tiny_model("bert"), max_tokens=None, window=8)
    torch.manual_seed(1)
    model = LongspanForEvidence(long.config).eval()
    model.longspan.load_state_dict({name: 4 * weight for name, weight in long.state_dict().items()}, strict=False)
    for scorer in (model.window_scorer, model.sentence_scorer):
        torch.nn.init.normal_(scorer.out.weight, std=0.1)
    return model


def rows():
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(8):
        length = 20 + number
        windows = [[start, start + 6] for start in range(5, length - 6, 3)]
        ids = torch.randint(5, 99, (length - 5,), generator=generator).tolist()
        labels = [int(place == number % len(windows)) for place in range(len(windows))]
        found.append({"input_ids": QUESTION + ids, "windows": windows, "window_labels": labels})
    return found


def collate(features):
    longest = max(len(row["input_ids"]) for row in features)
    most = max(len(row["windows"]) for row in features)
    batch = {
        "input_ids": [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in features],
        "question_lengths": [len(QUESTION)] * len(features),
        "windows": [row["windows"] + [[0, 1]] * (most - len(row["windows"])) for row in features],
    }
    found = {name: torch.tensor(values) for name, values in batch.items()}
    found["token_mask"] = torch.arange(longest) < torch.tensor([[len(row["input_ids"])] for row in features])
    found["window_mask"] = torch.arange(most) < torch.tensor([[len(row["windows"])] for row in features])
    if "window_labels" in features[0]:
        labels = [row["window_labels"] + [0] * (most - len(row["windows"])) for row in features]
        found["window_labels"] = torch.tensor(labels).bool()
    return found


def test_a_reader_is_pruned(reader):
    features = rows()
    batches = [collate(features[start : start + 4]) for start in (0, 4)]
    small = prune(reader, batches, Pruning(heads=1, ffn=9))
    assert type(small) is LongspanForEvidence
    assert [(block.heads, block.ffn_width) for block in small.config.encoder_config.blocks] == [(1, 9)] * 3
    whole = prune(reader, batches, Pruning(heads=2, ffn=40))
    for name, weight in reader.state_dict().items():
        assert torch.equal(whole.state_dict()[name], weight)


def test_a_reader_learns_the_scores_of_another(reader, tmp_path):
    features = Rows(rows(), collate)
    batch = collate(features.features)
    del batch["window_labels"]

    @torch.no_grad()
    def divergence(model):
        ours, theirs = (one(**batch).window_scores.log_softmax(-1) for one in (model, reader))
        return {"closeness": -float((theirs.exp() * (theirs - ours).nan_to_num(0)).sum(-1).mean())}

    student = student_of(reader, 2)
    before = divergence(student)["closeness"]
    settings = Distillation(
        epochs=8, batch=4, learning_rate=1e-3, bf16=False, keep="nothing", loss=DistillationLoss(hard_labels=0.1)
    )
    trained = distill(reader, student, features, tmp_path / "run", settings, evaluate=divergence)
    assert divergence(trained)["closeness"] > before / 2
    with pytest.raises(NotImplementedError, match="keep='nothing'"):
        distill(reader, student_of(reader, 2), features, tmp_path / "kept", Distillation(epochs=1))
    with pytest.raises(NotImplementedError, match="reads a question twice"):
        settings = Distillation(loss=DistillationLoss(relations=1))
        distill(reader, student_of(reader, 2), features, tmp_path / "relations", settings)


def test_a_pruned_reader_learns_the_hidden_states_of_the_whole_one(reader, tmp_path):
    features = Rows(rows(), collate)
    batches = [features.collate(features.features[:4])]
    student = prune(reader, batches, Pruning(heads=1, ffn=20))

    @torch.no_grad()
    def distance(model):
        batch = collate(features.features)
        ours, theirs = (one(**batch, output_hidden_states=True).hidden_states for one in (model, reader))
        assert len(ours) == len(theirs) == 4  # of the embeddings and of 3 layers
        mask = batch["token_mask"][..., None]
        return {"closeness": -sum(float(((a - b) * mask).square().sum()) for a, b in zip(ours, theirs, strict=True))}

    before = distance(student)["closeness"]
    loss = DistillationLoss(logits=0.0, hidden_states=1.0)
    settings = Distillation(epochs=8, batch=4, learning_rate=1e-3, bf16=False, keep="nothing", loss=loss)
    trained = distill(reader, student, features, tmp_path / "run", settings, evaluate=distance)
    assert distance(trained)["closeness"] > before / 2
