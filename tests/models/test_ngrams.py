import pytest
import torch
from tests.compression.small import pad, tiny_classifier, tiny_features, tiny_ours

from longspan import accelerate
from longspan.compression.ngrams import with_ngrams
from longspan.models import LongspanForSequenceClassification
from longspan.models.ngrams import NgramLogits, ngram_buckets
from longspan.models.quantize import quantize_checkpoint

BUCKETS = 97


def some_table(labels=3):
    return torch.randn(BUCKETS, labels, generator=torch.Generator().manual_seed(5))


def bucket(*gram):
    """Of a token, or of a pair of them that are all there is."""
    found, _ = ngram_buckets(torch.tensor([gram]), None, BUCKETS)
    return int(found[0, -1])


def by_hand(ids, mask, table):
    total = torch.zeros(table.shape[1])
    for place, token in enumerate(ids):
        if mask[place]:
            total += table[bucket(token)]
            if place + 1 < len(ids) and mask[place + 1]:
                total += table[bucket(token, ids[place + 1])]
    return total


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_every_token_and_pair_of_neighbors_speaks_once_and_padding_does_not(tokens):
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(50, (5, tokens), generator=generator)
    mask = torch.rand(5, tokens, generator=generator) > 0.3  # also gaps, and padding before the first token
    module = NgramLogits(BUCKETS, 3)
    assert not module(ids).any()
    with torch.no_grad():
        module.weight.copy_(some_table())
    for given in (mask, torch.ones_like(mask)):
        expected = torch.stack([by_hand(*row, some_table()) for row in zip(ids.tolist(), given, strict=True)])
        torch.testing.assert_close(module(ids, given), expected)
    torch.testing.assert_close(module(ids), expected)


def test_ngrams_spread_evenly_over_their_buckets():
    first, second = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    pairs = torch.stack((first.flatten(), second.flatten()), 1)
    buckets, _ = ngram_buckets(pairs, None, 1 << 20)
    taken = len(buckets[:, 2].unique())  # chance would leave 19 of 1,000 to share one
    assert taken > 0.97 * len(pairs)
    assert not set(buckets[:, 2].tolist()) & set(buckets[:1, 0].tolist())


def test_a_classifier_adds_what_its_table_says_in_every_precision(tmp_path):
    plain, batch = tiny_ours(), pad(tiny_features(6))
    model = with_ngrams(plain, some_table())
    mask = batch["attention_mask"].bool()
    said = model.ngrams(batch["input_ids"], mask)
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits + said)
        model.save_pretrained(tmp_path / "model")
        again = LongspanForSequenceClassification.from_pretrained(tmp_path / "model").eval()
        assert again.config.ngram_buckets == BUCKETS
        torch.testing.assert_close(again(**batch).logits, model(**batch).logits)
        for precision in ("fp32", "bf16", "int8"):
            quantize_checkpoint(tmp_path / "model", tmp_path / precision, precision=precision)
            packed = LongspanForSequenceClassification.from_pretrained(tmp_path / precision).eval()
            assert torch.equal(packed.ngrams.weight, model.ngrams.weight)
            alone = accelerate(tiny_ours(), precision)(**batch).logits
            torch.testing.assert_close(packed(**batch).logits, alone + said, rtol=1e-4, atol=1e-4)


def test_the_table_learns_with_the_model():
    model = with_ngrams(tiny_ours(), some_table()).train()
    model(**pad(tiny_features(2))).loss.backward()
    assert model.ngrams.weight.grad.abs().sum() > 0


def test_what_cannot_hear_ngrams_is_refused():
    model = with_ngrams(tiny_classifier(), some_table())  # of transformers
    with pytest.raises(ValueError, match="which inputs_embeds do not show: pass input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, model.config.hidden_size))
    with pytest.raises(ValueError, match="the table speaks of 2 labels, and the model has 3"):
        with_ngrams(model, some_table(2))
    with pytest.raises(ValueError, match="n-grams are heard by classifiers of sequences; got LongspanModel"):
        with_ngrams(model.longspan, some_table())
