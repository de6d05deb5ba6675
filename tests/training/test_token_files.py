import numpy as np
import pytest

from longspan.models.text_tokenizers import encode
from longspan.training.texts import find_texts
from longspan.training.token_files import encode_texts, load_token_files, make_token_files, unit_of

TEXT = "the zoo is old. thé river, 漢 too. " * 40


@pytest.fixture
def book(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    return find_texts(tmp_path / "book.txt")


@pytest.mark.parametrize(
    ("kind", "unit", "dtype"),
    [
        ("character", "character", np.uint8),
        ("byte", "byte", np.uint8),
        ("bpe", "character", np.uint16),
    ],
)
def test_token_files_hold_the_text(kind, unit, dtype, book, tmp_path):
    made = make_token_files(book, tmp_path / "tokens", kind, vocab_size=300)
    assert made.unit == unit_of(made.tokenizer) == unit
    for split, ids in made.splits.items():
        assert ids.dtype == dtype and not ids.flags.writeable
        text = book.read(split)
        assert made.tokenizer.decode(ids.tolist()) == text.decode()
        assert made.units[split] == (len(text) if kind == "byte" else len(text.decode()))
    ids, units = encode_texts(book, "dev", made.tokenizer)
    assert ids.tolist() == made.splits["dev"].tolist() and units == made.units["dev"]


def test_files_are_made_once_and_found_again(book, tmp_path):
    first = make_token_files(book, tmp_path / "tokens")
    before = (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns
    told = []
    again = make_token_files(book, tmp_path / "tokens", tell=told.append)
    assert (tmp_path / "tokens" / "train.bin").stat().st_mtime_ns == before and not told
    assert again.fingerprint == first.fingerprint == load_token_files(tmp_path / "tokens").fingerprint
    (tmp_path / "book.txt").touch()  # the same text, written again
    assert make_token_files(find_texts(tmp_path / "book.txt"), tmp_path / "tokens").fingerprint == first.fingerprint


def test_tokens_of_another_text_or_tokenizer_are_refused(book, tmp_path):
    make_token_files(book, tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"another tokenizer \(character; wanted: byte\)"):
        make_token_files(book, tmp_path / "tokens", "byte")
    (tmp_path / "book.txt").write_text(TEXT + "more")
    with pytest.raises(ValueError, match=r"tokens of another text than book\.txt"):
        make_token_files(find_texts(tmp_path / "book.txt"), tmp_path / "tokens")


def test_text_must_keep_to_a_given_alphabet(book, tmp_path):
    with pytest.raises(ValueError, match="are outside the model's alphabet"):
        make_token_files(book, tmp_path / "tokens", alphabet="abc ")
    assert not list(tmp_path.glob("*tokens*"))


def test_bytes_are_read_where_there_is_no_text(tmp_path):
    path = tmp_path / "noise.txt"
    path.write_bytes(bytes(range(256)) * 4)
    with pytest.raises(ValueError, match=r"no text in UTF-8 \(byte 128\).*tokenizer 'byte'"):
        make_token_files(find_texts(path), tmp_path / "tokens")
    made = make_token_files(find_texts(path), tmp_path / "tokens", "byte")
    assert sum(map(len, made.splits.values())) == 1024


def test_a_tokenizer_of_another_model_is_taken_as_it_is(book, tokenizer, tmp_path):
    made = make_token_files(book, tmp_path / "tokens", tokenizer)
    assert made.splits["dev"].tolist() == encode(tokenizer, book.read("dev")).tolist()
    assert tokenizer.cls_token_id not in made.splits["train"]
    tokenizer.backend_tokenizer.enable_truncation(8)  # as a call of the tokenizer may leave it
    try:
        assert make_token_files(book, tmp_path / "tokens", tokenizer).fingerprint == made.fingerprint
    finally:
        tokenizer.backend_tokenizer.no_truncation()


def test_files_cut_short_and_missing_ones_are_refused(book, tmp_path):
    make_token_files(book, tmp_path / "tokens")
    (tmp_path / "tokens" / "dev.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"dev\.bin should hold"):
        load_token_files(tmp_path / "tokens")
    with pytest.raises(FileNotFoundError, match=r"has no tokens\.json"):
        load_token_files(tmp_path)
    with pytest.raises(ValueError, match="tokenizer must be 'character', 'byte', 'bpe'"):
        make_token_files(book, tmp_path / "others", "word")
