import numpy as np
import pytest
from transformers import AutoTokenizer

from longspan.models.text_tokenizers import (
    TEXT8_ALPHABET,
    bpe_tokenizer,
    byte_tokenizer,
    character_tokenizer,
    encode,
    tokenization_of,
)

TEXT = "the cat  sat\n on thé mat 漢\t<é>"


@pytest.mark.parametrize("kind", ["character", "byte", "bpe"])
def test_a_saved_tokenizer_says_the_same_ids_and_gives_the_text_back(kind, tmp_path):
    made = {
        "character": lambda: character_tokenizer(TEXT),
        "byte": byte_tokenizer,
        "bpe": lambda: bpe_tokenizer([TEXT] * 3, 270),
    }[kind]()
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenization_of(loaded) == tokenization_of(made) == kind
    ids = encode(loaded, TEXT)
    assert ids.tolist() == encode(made, TEXT.encode()).tolist() == loaded(TEXT)["input_ids"]
    assert loaded.decode(ids.tolist()) == TEXT
    assert len(loaded) > ids.max()


def test_tokens_are_characters_bytes_or_learnt_pieces():
    assert encode(character_tokenizer(TEXT8_ALPHABET), "a z").tolist() == [1, 0, 26]
    assert encode(byte_tokenizer(), "aé").tolist() == [*"aé".encode()]
    assert encode(byte_tokenizer(), bytes([255, 0])).tolist() == [255, 0]
    assert len(encode(bpe_tokenizer(["cat cat cat"], 300), "cat cat")) == 2


def test_characters_outside_the_alphabet_are_named():
    with pytest.raises(ValueError, match=r"3 of 7 characters are outside.*'1' \(2 times\), 'B' \(1 times\).*the 2th"):
        encode(character_tokenizer("ab "), "aB a 11")
    with pytest.raises(ValueError, match="and 16 other characters"):
        encode(character_tokenizer("A"), TEXT8_ALPHABET[1:])
    assert encode(character_tokenizer("ab"), "").tolist() == []


def test_vocabularies_that_hold_nothing_are_refused():
    with pytest.raises(ValueError, match="an alphabet has one character or more"):
        character_tokenizer("")
    with pytest.raises(ValueError, match="got vocab_size=256"):
        bpe_tokenizer(["a"], 256)


def test_long_texts_are_encoded_without_a_loop():
    text = TEXT8_ALPHABET * 20_000
    np.testing.assert_array_equal(encode(character_tokenizer(TEXT8_ALPHABET), text), np.tile(np.arange(27), 20_000))
