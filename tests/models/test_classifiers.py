import logging

import pytest
import torch
from tests.models.tiny import MAX_TOKENS, tiny_model
from transformers import MPNetConfig, MPNetForSequenceClassification, MPNetModel
from transformers.utils import logging as transformers_logging

from longspan.models.classifiers import load_classifier
from longspan.models.heads import LongspanForSequenceClassification, LongspanForSpanClassification

LABELS = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def _no_report_about_new_heads():
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    yield
    transformers_logging.set_verbosity(before)


@pytest.fixture
def save(tokenizer, tmp_path):
    """Writes a tiny checkpoint with its tokenizer; its directory."""

    def write(model="bert"):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        (tiny_model(model) if isinstance(model, str) else model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.fixture
def mpnet(tokenizer):
    torch.manual_seed(0)
    return MPNetModel(
        MPNetConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=66,
        )
    )


def test_a_base_model_gets_a_head_for_the_labels(save):
    loaded = load_classifier(save(), LABELS)
    assert isinstance(loaded.model, LongspanForSequenceClassification)
    assert loaded.model.config.id2label == dict(enumerate(LABELS))
    assert loaded.max_tokens == MAX_TOKENS
    assert loaded.lengthened_from is None
    assert loaded.model.dtype == torch.float32


def test_a_new_head_is_drawn_from_the_seed(save):
    folder = save()
    first, again, other = (load_classifier(folder, LABELS, seed=seed).model.classifier.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_families_that_longspan_lacks_stay_with_hugging_face(save, mpnet):
    loaded = load_classifier(save(mpnet), LABELS)
    assert isinstance(loaded.model, MPNetForSequenceClassification)
    assert loaded.model.config.id2label == dict(enumerate(LABELS))
    assert loaded.max_tokens == 64  # its tokenizer's; the position table counts two rows more


def test_a_model_asked_to_read_more_than_it_can_is_made_long_and_says_so(save, caplog):
    with caplog.at_level(logging.WARNING, "longspan"):
        loaded = load_classifier(save(), LABELS, max_tokens=200, window=8)
    assert loaded.max_tokens == loaded.tokenizer.model_max_length == 200
    assert loaded.lengthened_from == MAX_TOKENS
    assert "reads 64 tokens: made long, to read 200 through windows of 8" in caplog.text
    ids = torch.randint(5, 99, (1, 200))
    assert loaded.model(input_ids=ids).logits.shape == (1, 3)


def test_a_model_that_reads_enough_is_left_as_it_is(save, caplog):
    with caplog.at_level(logging.WARNING, "longspan"):
        loaded = load_classifier(save("modernbert"), LABELS, max_tokens=5000)
        assert load_classifier(save("roberta"), LABELS, max_tokens=MAX_TOKENS).lengthened_from is None
    assert loaded.max_tokens == 5000
    assert loaded.lengthened_from is None
    assert not caplog.text


def test_a_model_of_another_family_asked_to_read_more_is_refused(save, mpnet):
    with pytest.raises(ValueError, match="reads at most 64 tokens, and longspan cannot lengthen a mpnet model"):
        load_classifier(save(mpnet), LABELS, max_tokens=65)


def test_spans_get_their_head_where_longspan_has_the_family(save, mpnet):
    assert isinstance(load_classifier(save(), LABELS, spans=True).model, LongspanForSpanClassification)
    with pytest.raises(NotImplementedError, match="it has none for model_type 'mpnet'"):
        load_classifier(save(mpnet), LABELS, spans=True)


def test_a_head_for_the_same_labels_is_kept(save):
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: n for n, name in enumerate(LABELS)}}
    theirs = tiny_model("bert", "sequence_classification", **names)
    assert torch.equal(load_classifier(save(theirs), LABELS).model.classifier.weight, theirs.classifier.weight)


def test_a_head_without_names_takes_the_labels_names(save):
    theirs = tiny_model("bert", "sequence_classification", num_labels=3)
    loaded = load_classifier(save(theirs), LABELS)
    assert torch.equal(loaded.model.classifier.weight, theirs.classifier.weight)
    assert loaded.model.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("found", [("blue", "green", "red"), ("red", "green"), ("yes", "no", "maybe")])
def test_a_head_for_other_labels_is_refused_unless_a_new_one_is_wanted(found, save):
    names = {"id2label": dict(enumerate(found)), "label2id": {name: n for n, name in enumerate(found)}}
    theirs = tiny_model("bert", "sequence_classification", **names)
    folder = save(theirs)
    with pytest.raises(
        ValueError, match=r"tells apart .* and the task's labels are 'red', 'green', 'blue': ask for a n"
    ):
        load_classifier(folder, LABELS)
    fresh = load_classifier(folder, LABELS, new_head=True).model
    assert fresh.config.id2label == dict(enumerate(LABELS))
    assert fresh.classifier.weight.shape == (3, 24)
    assert fresh.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(fresh.longspan.embeddings.word.weight, theirs.bert.embeddings.word_embeddings.weight)


def test_a_new_head_for_a_model_of_hugging_face(save, mpnet):
    config = mpnet.config
    config.id2label, config.label2id = {0: "yes", 1: "no"}, {"yes": 0, "no": 1}
    theirs = MPNetForSequenceClassification(config)
    fresh = load_classifier(save(theirs), LABELS, new_head=True).model
    assert isinstance(fresh, MPNetForSequenceClassification)
    assert fresh.classifier.out_proj.weight.shape == (3, 16)
    assert not torch.equal(fresh.classifier.dense.weight, theirs.classifier.dense.weight)
    assert torch.equal(fresh.mpnet.embeddings.word_embeddings.weight, theirs.mpnet.embeddings.word_embeddings.weight)


def test_too_few_tokens_are_refused(save):
    with pytest.raises(ValueError, match=r"max_tokens must be at least 3.*got 2"):
        load_classifier(save(), LABELS, max_tokens=2)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(OSError, match="nothing-here"):
        load_classifier(tmp_path / "nothing-here", LABELS)
