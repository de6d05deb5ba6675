import gzip
import math

import numpy as np
import pytest
import torch
from tests.training.language_run import small_model
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from longspan.models.text_tokenizers import bpe_tokenizer, byte_tokenizer, character_tokenizer, encode
from longspan.tasks.language import bits_of_windows, bits_per_character, compressors, load_language_model

ALPHABET = "abcde"
TOKENIZER = character_tokenizer(ALPHABET)
TOKENS = np.random.default_rng(0).integers(0, 5, 50).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
    return small_model(5).eval()


def surprise(model, start, place):
    """Bits of the token at `place`, read from `start` on."""
    ids = torch.from_numpy(TOKENS[start : place + 1].astype(np.int64))[None]
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, -2]
    return -torch.log_softmax(logits, 0)[ids[0, -1]].item() / math.log(2)


def test_every_token_is_scored_once_with_the_context_of_its_window(model):
    """Windows of 20 at 8 tokens: the first scores 19, the next ones their last 8, the last one what is left."""
    found = bits_per_character(model, TOKENIZER, TOKENS, length=20, stride=8, bf16=False)
    ends = [20, 28, 36, 44, 50]
    starts = [0, 0, *np.repeat([8, 16, 24, 30], [8, 8, 8, 6])]
    expected = [surprise(model, 0, place) for place in range(1, 20)]
    expected += [surprise(model, start, 20 + number) for number, start in enumerate(starts[2:])]
    assert len(expected) == 49
    assert found.bits == pytest.approx(np.mean(expected), rel=1e-5)
    assert (found.windows, found.all_windows, found.tokens) == (len(ends), len(ends), 49)
    assert "scores all its tokens but the very first" in found.first_window


def test_a_sample_of_windows_leaves_the_first_one_out(model):
    found = bits_per_character(model, TOKENIZER, TOKENS, length=20, stride=8, limit=2, bf16=False, seed=3)
    again = bits_per_character(model, TOKENIZER, TOKENS, length=20, stride=8, limit=2, bf16=False, seed=3)
    assert found.bits == again.bits and (found.windows, found.all_windows) == (2, 5)
    assert "is not scored" in found.first_window
    all_but_first = bits_per_character(model, TOKENIZER, TOKENS, length=20, stride=8, limit=4, bf16=False)
    assert all_but_first.tokens == 30


def test_one_window_is_the_whole_text(model):
    found = bits_per_character(model, TOKENIZER, TOKENS, length=50, stride=10, bf16=False)
    assert found.windows == 1
    assert found.bits == pytest.approx(np.mean([surprise(model, 0, place) for place in range(1, 50)]), rel=1e-5)


def test_the_same_places_are_scored_at_all_lengths(model):
    for length in (6, 20):
        found = bits_of_windows(model, TOKENS, [20, 33], length=length, scored=4, bf16=False)
        expected = [sum(surprise(model, end - length, end - 4 + i) for i in range(4)) for end in (20, 33)]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_bits_are_per_character_and_bytes_per_byte():
    text = "ab abc ab abcd " * 20
    for tokenizer, unit, units in (
        (bpe_tokenizer([text], 265), "character", len(text)),
        (byte_tokenizer(), "byte", len(text)),
    ):
        ids = encode(tokenizer, text)
        model = small_model(len(tokenizer)).eval()
        found = bits_per_character(model, tokenizer, ids, length=len(ids), stride=10, bf16=False)
        all_bits = bits_of_windows(model, ids, [len(ids)], length=len(ids), scored=len(ids) - 1, bf16=False)[0]
        first = len(tokenizer.decode(ids[:1].tolist()))
        assert found.unit == unit
        assert found.bits == pytest.approx(all_bits / (units - first), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"length": 51, "stride": 8},
            "has 50 tokens, less than one window of 51: give more text, or a length of at most 50",
        ),
        ({"length": 20, "stride": 20}, "stride must be at least 1 and smaller than length, 20; got 20"),
        ({"length": 20, "stride": 0}, "stride must be at least 1"),
        ({"length": 20, "stride": 8, "limit": 0}, "limit must be at least 1"),
    ],
)
def test_windows_that_cannot_be_read_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        bits_per_character(model, TOKENIZER, TOKENS, **options)
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=1, n_positions=16))
    with pytest.raises(ValueError, match="reads rows of at most 16 tokens; got a length of 20"):
        bits_per_character(stock, TOKENIZER, TOKENS, length=20, stride=8)


def test_evaluation_leaves_the_model_in_training():
    model = small_model(5).train()
    bits_per_character(model, TOKENIZER, TOKENS, length=20, stride=8)
    assert model.training


def test_compressors_are_measured_on_the_same_text():
    text = b"the old zoo by the river " * 400
    rows = {row.name: row for row in compressors(text, units=len(text))}
    assert rows["gzip -9"].bits == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text), rel=1e-2)
    assert 0 < rows["xz -9e"].bits < rows["gzip -9"].bits * 2


def test_ppm_gains_from_text_that_it_has_read():
    pytest.importorskip("pyppmd")
    words = np.random.default_rng(0).choice(["river", "zebra", "old", "town", "report", "near"], 3000)
    text = " ".join(words).encode()
    rows = compressors(text[:4000], units=4000, primer=text[4000:])
    assert [row.name.split(",")[0] for row in rows] == ["gzip -9", "xz -9e", "PPMd", "PPMd"]
    assert rows[3].bits < rows[2].bits < rows[0].bits
    assert "after 0.0 MB of training text" in rows[3].name


def test_a_missing_compressor_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyppmd", None)
    row = compressors(b"text", units=4)[-1]
    assert row.bits is None and row.note == "pip install longspan[evaluate]"


def test_what_is_no_language_model_is_refused(tmp_path, tokenizer):
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="holds BertModel, which is no language model that writes"):
        load_language_model(tmp_path / "bert")
    small_model(5).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="has no tokenizer beside the model"):
        load_language_model(tmp_path / "lm")
    TOKENIZER.save_pretrained(tmp_path / "lm")
    model, found = load_language_model(tmp_path / "lm")
    assert not model.training and len(found) == 5
