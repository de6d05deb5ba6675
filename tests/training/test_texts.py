import pytest

from longspan.training import texts
from longspan.training.texts import find_texts

SPLITS = ("train", "dev", "test")


def test_a_file_is_cut_at_90_and_95_percent_and_between_characters(tmp_path):
    text = "aé漢" * 100
    (tmp_path / "book.txt").write_text(text)
    found = find_texts(tmp_path / "book.txt")
    parts = [found.read(split).decode() for split in SPLITS]
    assert "".join(parts) == found.read("all").decode() == text
    size = len(text.encode())
    assert 0.9 * size <= len(parts[0].encode()) < 0.9 * size + 3
    assert found.about == "the first 90% of book.txt for training, then 5% for dev and 5% for test"


def test_a_folder_of_files_is_one_text_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, letter in (("b.txt", "b"), ("a.txt", "a"), ("sub/c.txt", "c"), ("z.md", "z")):
        (tmp_path / name).write_text(letter * 100)
    found = find_texts(tmp_path)
    assert found.read("all") == b"a" * 100 + b"b" * 100 + b"c" * 100
    assert [len(found.read(split)) for split in SPLITS] == [270, 15, 15]


@pytest.mark.parametrize("dev", ["dev", "valid", "validation"])
def test_a_folder_with_splits_keeps_them(dev, tmp_path):
    for name in ("train", dev, "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    found = find_texts(tmp_path)
    assert [found.read(split) for split in SPLITS] == [b"train", dev.encode(), b"test"]
    (tmp_path / "test.txt").unlink()
    with pytest.raises(ValueError, match=r"lacks test\.txt: give all three"):
        find_texts(tmp_path)


def test_official_files_have_to_be_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "OFFICIAL_BYTES", {"text8": 1000})
    (tmp_path / "text8").write_bytes(b" " * 999)
    with pytest.raises(ValueError, match="has 999 bytes and text8 has 1,000: it is not whole"):
        find_texts(tmp_path / "text8")
    (tmp_path / "text8").write_bytes(b"x" * 1000)
    assert [len(find_texts(tmp_path / "text8").read(split)) for split in SPLITS] == [900, 50, 50]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text8.zip", b"PK", "is an archive: unpack it"),
        ("empty.txt", b"", "is empty"),
        ("folder", None, r"holds no \.txt file"),
    ],
)
def test_what_is_no_text_is_refused(name, content, message, tmp_path):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_texts(path)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        find_texts(tmp_path / "other")


def test_unknown_splits_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="split must be one of train, dev, test or all; got 'valid'"):
        find_texts(tmp_path / "a.txt").read("valid")


@pytest.mark.parametrize("text", ["word " * 50, "漢字" * 50, "a" * 99, "é", " ", "x y" + "é" * 40])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_pieces_are_whole_characters_whatever_their_size(text, size, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(text)
    pieces = list(texts.Part(path=path, start=0, end=len(text.encode())).pieces(size))
    assert "".join(piece.decode() for piece in pieces) == text
    assert all(pieces)
