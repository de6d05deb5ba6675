import pytest
import torch
import torch.nn.functional as F
from tests.models.tiny import FAMILIES, batch, tiny_model
from transformers.utils import logging

from longspan import LongspanForSpanClassification, LongspanModel, accelerate, to_long

RANGES = torch.tensor([[[1, 3], [4, 8]], [[1, 2], [5, 9]], [[3, 4], [2, 20]]])
LABELS = {0: "no", 1: "yes", 2: "unclear"}


@pytest.fixture(autouse=True)
def _no_report_about_the_new_head():
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def from_checkpoint(tmp_path, family="bert", task=None, **changes):
    """(ours with a new head, a batch) of a tiny checkpoint."""
    theirs = tiny_model(family, task, initializer_range=0.2, **changes)
    theirs.save_pretrained(tmp_path)
    torch.manual_seed(3)
    ours = LongspanForSpanClassification.from_pretrained(
        tmp_path, id2label=LABELS, label2id={name: n for n, name in LABELS.items()}
    )
    return ours.eval(), batch(theirs.config, [37, 9, 21])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", [None, "sequence_classification"])
def test_a_checkpoint_gets_the_head_and_is_read_back_the_same(family, task, tmp_path):
    model, inputs = from_checkpoint(tmp_path / "theirs", family, task)
    logits = model(**inputs, span_ranges=RANGES).logits
    assert logits.shape == (3, 3)
    model.save_pretrained(tmp_path / "ours")
    again = LongspanForSpanClassification.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(**inputs, span_ranges=RANGES).logits, logits)
    assert again.config.id2label == LABELS
    assert again.config.num_spans == 2


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_logits_are_those_of_the_first_token_and_the_mean_of_each_span(family, tmp_path):
    model, inputs = from_checkpoint(tmp_path, family)
    x = model.longspan(**inputs).last_hidden_state
    for row, spans in enumerate(RANGES.tolist()):
        length = int(inputs["attention_mask"][row].sum())
        parts = [x[row, 0], *(x[row, start : min(end, length)].mean(0) for start, end in spans)]
        expected = F.linear(torch.cat(parts), model.classifier.weight, model.classifier.bias)
        torch.testing.assert_close(model(**inputs, span_ranges=RANGES).logits[row], expected, atol=1e-5, rtol=1e-4)


def test_negative_features_are_pooled_as_they_are(tmp_path):
    """A maximum over a row that is zeroed outside of the span would lose every feature that is negative in it."""
    model, inputs = from_checkpoint(tmp_path)
    width = model.config.hidden_size
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.weight[0, width : 2 * width] = torch.eye(width)[5]
        model.classifier.bias.zero_()
    x = model.longspan(**inputs).last_hidden_state
    expected = torch.stack([x[n, start:end, 5].mean() for n, (start, end) in enumerate(RANGES[:, 0].tolist())])
    assert (expected < 0).any()
    torch.testing.assert_close(model(**inputs, span_ranges=RANGES).logits[:, 0], expected, atol=1e-5, rtol=1e-4)


def test_padding_changes_nothing(tmp_path):
    model, inputs = from_checkpoint(tmp_path)
    alone = {name: part[1:2, :9] for name, part in inputs.items()}
    together = model(**inputs, span_ranges=RANGES).logits[1:2]
    torch.testing.assert_close(model(**alone, span_ranges=RANGES[1:2]).logits, together, atol=1e-5, rtol=1e-4)


def test_the_loss_is_cross_entropy_and_reaches_every_part(tmp_path):
    model, inputs = from_checkpoint(tmp_path)
    labels = torch.tensor([0, 2, 1])
    out = model(**inputs, span_ranges=RANGES, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_made_long_reads_the_same_and_lets_spans_see_everything(tmp_path):
    model, inputs = from_checkpoint(tmp_path)
    logits = model(**inputs, span_ranges=RANGES).logits
    long = to_long(model, max_tokens=256, window=128).eval()
    assert isinstance(long, LongspanForSpanClassification)
    torch.testing.assert_close(long(**inputs, span_ranges=RANGES).logits, logits, atol=1e-5, rtol=1e-4)
    far = batch(long.config, [200])
    ranges = torch.tensor([[[2, 4], [190, 195]]])
    narrow = to_long(model, max_tokens=256, window=4).eval()
    marked = torch.zeros_like(far["input_ids"])
    marked[0, [0, 2, 3, *range(190, 195)]] = 1
    chosen = narrow(**far, span_ranges=ranges).logits
    assert torch.equal(chosen, narrow(**far, span_ranges=ranges, global_attention_mask=marked).logits)
    assert not torch.allclose(chosen, narrow(**far, span_ranges=ranges, global_attention_mask=marked * 0).logits)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (None, r"shape \[B, 2, 2\].*got none"),
        (RANGES[:, :1], r"shape \[B, 2, 2\], start and end of each span; got \(3, 1, 2\)"),
        (torch.tensor([[[1, 3], [4, 4]]] * 3), "holds no token"),
        (torch.tensor([[[1, 3], [12, 14]]] * 3), "must not lie in padding"),
    ],
)
def test_ranges_that_make_no_sense_are_refused(ranges, message, tmp_path):
    model, inputs = from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=message):
        model(**inputs, span_ranges=ranges)


def test_exactly_one_input_is_wanted(tmp_path):
    model, _ = from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(span_ranges=RANGES)


def test_the_base_model_can_be_taken_out(tmp_path):
    model, inputs = from_checkpoint(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    base = LongspanModel.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(base(**inputs).last_hidden_state, model.longspan(**inputs).last_hidden_state)


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("int8", 0.05)])
def test_the_packed_engine_computes_it_too(precision, error, tmp_path):
    model, inputs = from_checkpoint(tmp_path, hidden_size=32, intermediate_size=64)
    with torch.inference_mode():
        logits = model(**inputs, span_ranges=RANGES).logits
        accelerate(model, precision)
        found = model(**inputs, span_ranges=RANGES).logits
    assert (found - logits).norm() < error * logits.norm()
