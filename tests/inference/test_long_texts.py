from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.models.tiny import tiny_config
from transformers import BertConfig, ElectraConfig

from longspan.errors import DocumentError, NotFiniteError
from longspan.inference.long_texts import OVERLAP_TOKENS, LongTexts, window_tokens
from longspan.models import LongspanConfig
from longspan.models.checkpoints import translate_config

WORDS = "alice wrote the report near the old river where the red zebra lives in town".split()  # noqa: SIM905


class Identity:
    """A network whose hidden state of a token is its id, one-hot, and nan at padding."""

    def __init__(self, vocabulary, limit, pad_token_id=0):
        self.vocabulary, self.lengths = vocabulary, []
        self.config = BertConfig(max_position_embeddings=limit, pad_token_id=pad_token_id)

    def __call__(self, input_ids, attention_mask):
        self.lengths += attention_mask.sum(1).tolist()
        states = torch.nn.functional.one_hot(input_ids, self.vocabulary).float()
        return SimpleNamespace(last_hidden_state=states.masked_fill(attention_mask[..., None] == 0, torch.nan))


def sums(output, row, counted):
    return output.last_hidden_state[row, counted].double().sum(0)


@pytest.mark.parametrize("limit", [16, 64, 320])
def test_every_token_counts_once_however_many_windows_read_it(tokenizer, limit):
    network = Identity(len(tokenizer), limit)
    texts = [
        " ".join(WORDS[place % len(WORDS)] for place in range(length))
        for length in (1, 5, limit - 2, limit - 1, 2 * limit, 7 * limit + 3)
    ]
    found = LongTexts(network, tokenizer).means(texts, sums, "vectors")
    limit = min(limit, tokenizer.model_max_length)
    for text, (tokens, mean) in zip(texts, found, strict=True):
        ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
        assert tokens == len(ids) - 2
        expected = np.bincount(ids, minlength=len(tokenizer)) / len(ids)
        np.testing.assert_allclose(mean, expected, atol=1e-12)
    assert max(network.lengths) == limit


def test_counting_passes_to_the_next_window_in_the_middle_of_an_overlap(tokenizer):
    texts = LongTexts(Identity(len(tokenizer), 16), tokenizer)  # 14 tokens of text, 7 of them shared
    windows = texts._windows(list(range(100, 125)))
    places = [[*window.input_ids[window.counted]] for window in windows]
    assert [window.input_ids[1:-1] for window in windows] == [
        list(range(100, 114)),
        list(range(107, 121)),
        list(range(111, 125)),
    ]
    assert places == [[2, *range(100, 110)], [*range(110, 116)], [*range(116, 125), 3]]
    assert OVERLAP_TOKENS > 7


def test_max_tokens_cuts_and_counts_the_special_tokens(tokenizer):
    network = Identity(len(tokenizer), 64)
    for most in (3, 20, 100):
        ((tokens, mean),) = LongTexts(network, tokenizer, most).means([" ".join(WORDS * 10)], sums, "vectors")
        ids = tokenizer(" ".join(WORDS * 10), truncation=False, verbose=False)["input_ids"]
        expected = np.bincount([*ids[: most - 1], ids[-1]], minlength=len(tokenizer)) / most
        assert tokens == most - 2
        np.testing.assert_allclose(mean, expected, atol=1e-12)
    with pytest.raises(ValueError, match="max_tokens counts 2 special tokens and must be larger; got 2"):
        LongTexts(network, tokenizer, 2)


def test_texts_that_spell_special_tokens_are_read_as_they_are(tokenizer):
    ((tokens, _),) = LongTexts(Identity(len(tokenizer), 64), tokenizer).means(["alice [SEP] bob"], sums, "vectors")
    assert tokens == len(tokenizer("alice [ sep ] bob", add_special_tokens=False)["input_ids"])


def test_texts_without_tokens_and_outputs_that_are_not_finite_are_refused(tokenizer):
    texts = LongTexts(Identity(len(tokenizer), 64), tokenizer)
    with pytest.raises(DocumentError, match="no text that this model's tokenizer knows"):
        texts.means(["alice", "\u200b"], sums, "vectors")
    with pytest.raises(NotFiniteError, match="vectors"):
        texts.means(["alice"], lambda *_: torch.tensor([torch.nan]), "vectors")


def test_windows_are_as_long_as_the_position_table_or_as_what_a_rotary_model_was_trained_on(tokenizer):
    assert window_tokens(translate_config(tiny_config("roberta")), tokenizer) == 64
    assert window_tokens(translate_config(tiny_config("bert", max_position_embeddings=512)), tokenizer) == 512
    rotary = translate_config(tiny_config("modernbert", max_position_embeddings=8192))
    assert window_tokens(rotary, tokenizer) == 8192
    periodic = rotary.to_dict() | {"embeddings": rotary.embeddings | {"positions": 64, "position_period": 64}}
    assert window_tokens(LongspanConfig(**periodic), tokenizer) is None
    assert window_tokens(ElectraConfig(max_position_embeddings=514), SimpleNamespace(model_max_length=10**30)) == 512
    assert window_tokens(SimpleNamespace(model_type="other"), SimpleNamespace(model_max_length=10**30)) is None


def test_a_model_without_padding_reads_one_row_at_a_time(tokenizer):
    rows = []
    network = Identity(len(tokenizer), 64, pad_token_id=None)
    plain = LongTexts(network, tokenizer)
    plain.padding = None
    plain.network = lambda **inputs: rows.append(len(inputs["input_ids"])) or network(**inputs)
    plain.means(["alice", "bob", "the zoo"], sums, "vectors")
    assert rows == [1, 1, 1]
