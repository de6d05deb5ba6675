import json
import lzma

import pytest

from longspan.tasks.articles import read_articles, text8_alphabet, write_splits


def write(path, texts):
    lines = "\n".join(json.dumps({"id": str(number), "text": text}) for number, text in enumerate(texts))
    path.write_bytes(lzma.compress(lines.encode()) if path.suffix == ".xz" else lines.encode())
    return path


def articles(count=40):
    """Each with a title and ten sentences of its own."""
    return [
        "\n".join([f"TITLE {n}", *(f"Sentence {n * 10 + m} of an article about river and zoo ." for m in range(10))])
        for n in range(count)
    ]


def test_text_is_mapped_to_letters_and_single_spaces():
    assert (
        text8_alphabet("Alaska's 3rd, in 1987—Café Ñandú\n\t(x)")
        == "alaska s three rd in one nine eight seven cafe nandu x"
    )
    assert text8_alphabet("漢字 …") == ""


def test_splits_share_no_article_and_are_made_once(tmp_path):
    path = write(tmp_path / "docs.jsonl.xz", articles())
    folder = write_splits(path, tmp_path / "text", share=0.1)
    texts = {split: (folder / f"{split}.txt").read_text() for split in ("train", "dev", "test")}
    titles = {split: {word for word in text.split("title ")[1:]} for split, text in texts.items()}
    assert sum(map(len, titles.values())) == 40
    assert 3 <= len(titles["test"]) <= 6 and 3 <= len(titles["dev"]) <= 6
    assert not titles["train"] & titles["dev"] and not titles["train"] & titles["test"]
    path.unlink()
    assert write_splits(path, tmp_path / "text") == folder


def test_the_seed_decides_the_splits(tmp_path):
    path = write(tmp_path / "docs.jsonl", articles())
    made = [write_splits(path, tmp_path / str(n), seed=seed) / "test.txt" for n, seed in enumerate((0, 0, 1))]
    assert made[0].read_text() == made[1].read_text() != made[2].read_text()


def test_articles_that_repeat_one_of_test_or_dev_are_left_out(tmp_path):
    """Copies with another title, and others with the same title, of every article."""
    once = articles(20)
    copies = [text.replace("TITLE", "COPY").replace(" .", "  .") for text in once]
    same_title = [f"TITLE {n}\nAnother sentence that is long enough to be counted, number {n} ." for n in range(20)]
    told = []
    folder = write_splits(
        write(tmp_path / "a.jsonl", once + copies + same_title), tmp_path / "text", share=0.1, tell=told.append
    )
    held = (folder / "test.txt").read_text() + (folder / "dev.txt").read_text()
    train = (folder / "train.txt").read_text()
    for number in range(200):
        sentence = text8_alphabet(f"Sentence {number} of")
        assert not (sentence in held and sentence in train)
    assert "articles that repeat one of dev or test left out" in told[0]


def test_training_text_can_be_limited(tmp_path):
    folder = write_splits(write(tmp_path / "a.jsonl", articles()), tmp_path / "text", megabytes=0.002)
    assert len((folder / "train.txt").read_text()) == 2000


def test_files_that_hold_no_articles_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"give the articles to learn from.*\.jsonl or \.jsonl\.xz"):
        list(read_articles(tmp_path / "docs.jsonl.xz"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"id": 1}\n')
    with pytest.raises(ValueError, match=r"line 2 of .* is no JSON record with a text"):
        list(read_articles(tmp_path / "bad.jsonl"))
    with pytest.raises(ValueError, match="holds 2 articles; three splits need 3"):
        write_splits(write(tmp_path / "few.jsonl", articles(2)), tmp_path / "text")
