import csv
import json

import pytest

from longspan.tasks.text_files import Columns, text_task

ROWS = [("the zoo is old", "good"), ('a "red", old town', "bad"), ("river\nand town", "good"), ("bob", "bad")]


def write(path, rows=ROWS, header=("text", "label")):
    """Rows in the format that the file's suffix tells."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows] if header else rows)
    else:
        lines = ["\t".join(cell.replace("\n", " ") for cell in row) for row in ([header] if header else []) + [*rows]]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_every_format_gives_the_same_texts_and_labels(suffix, tmp_path):
    train, dev = write(tmp_path / f"train{suffix}"), write(tmp_path / f"dev{suffix}", ROWS[:1])
    task = text_task(train, dev=dev)
    expected = [(text.replace("\n", " ") if suffix == ".tsv" else text, label) for text, label in ROWS]
    assert [(row.texts[0], task.labels[row.label]) for row in task.examples("train")] == expected
    assert task.labels == ("bad", "good")
    assert len(task.examples("dev")) == 1
    assert task.name == "train"


def test_glue_files_pair_two_columns_and_their_quotes_mean_nothing(tmp_path):
    header = ("index", "sentence1", "sentence2", "label")
    rows = [("0", 'He said "no', "He agreed", "not_entailment"), ("1", '"', "a zoo", "entailment")]
    train = write(tmp_path / "train.tsv", rows, header)
    test = write(tmp_path / "test.tsv", [row[:3] for row in rows], header[:3])
    columns = Columns(text="sentence1", text_pair="sentence2")
    task = text_task(train, dev=train, test=test, columns=columns)
    assert [row.texts for row in task.examples("train")] == [('He said "no', "He agreed"), ('"', "a zoo")]
    assert [row.label for row in task.examples("train")] == [1, 0]
    assert [row.label for row in task.examples("test")] == [None, None]


def test_numbers_name_the_columns_of_a_file_without_names(tmp_path):
    """As in GLUE's CoLA: source, label, star, sentence."""
    train = write(tmp_path / "train.tsv", [("gj04", "1", "", "the zoo"), ("gj04", "0", "*", "zoo the")], None)
    task = text_task(train, dev=train, columns=Columns(text="3", label="1"))
    assert [(row.texts, task.labels[row.label]) for row in task.examples("train")] == [
        (("the zoo",), "1"),
        (("zoo the",), "0"),
    ]


def test_labels_that_are_numbers_are_sorted_as_numbers(tmp_path):
    train = write(tmp_path / "train.jsonl", [("a", 10), ("b", 9), ("c", -1)])
    assert text_task(train, dev=train).labels == ("-1", "9", "10")
    train = write(tmp_path / "train.jsonl", [("a", True), ("b", False)])
    assert text_task(train, dev=train).labels == ("false", "true")


def test_dev_is_held_out_of_train_by_the_seed_and_shares_no_text_with_it(tmp_path):
    rows = [(f"Text  {n % 30}".swapcase() if n < 30 else f"text {n % 30}", str(n % 2)) for n in range(60)]
    train = write(tmp_path / "train.csv", rows)
    task, again, other = (text_task(train, dev_size=0.2, seed=seed) for seed in (0, 0, 1))
    texts = {
        split: {row.texts[0].casefold().replace("  ", " ") for row in task.examples(split)} for split in task.splits
    }
    assert len(task.examples("dev")) == 12
    assert not texts["train"] & texts["dev"]
    assert texts["train"] | texts["dev"] == {f"text {n}" for n in range(30)}
    assert task == again != other


def test_what_orange_writes_under_the_names_of_columns_is_no_row(tmp_path):
    path = tmp_path / "train.tab"
    path.write_text("Category\tText\nd\tstring\nclass\t\n\nred\tthe zoo\nblue\tthe river\n")
    task = text_task(path, dev=path, columns=Columns(text="Text", label="Category"))
    assert [row.texts[0] for row in task.examples("train")] == ["the zoo", "the river"]
    assert task.labels == ("blue", "red")


def test_documents_longer_than_the_csv_modules_limit_are_read(tmp_path):
    before = csv.field_size_limit()
    train = write(tmp_path / "train.csv", [("zoo " * 50_000, "a"), ("b", "b")])
    assert len(text_task(train, dev=train).examples("train")[0].texts[0]) == 200_000 > before
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_column_that_is_missing_is_refused_with_those_there_are(suffix, tmp_path):
    train = write(tmp_path / f"train{suffix}")
    with pytest.raises(ValueError, match=rf"train{suffix} has no column 'review' \(line 1|2\); it has 'text', 'label'"):
        text_task(train, columns=Columns(text="review"))
    with pytest.raises(ValueError, match="no column 'stars'"):
        text_task(train, columns=Columns(label="stars"))


def test_a_class_that_training_never_saw_is_refused_by_name(tmp_path):
    train, other = write(tmp_path / "train.csv"), write(tmp_path / "other.csv", [("x", "ugly"), ("y", "good")])
    for split in ("dev", "test"):
        files = {"dev": train} | {split: other}
        with pytest.raises(ValueError, match=r"other\.csv holds the class 'ugly', which no row of .*train\.csv has"):
            text_task(train, **files)


def test_empty_and_missing_files_are_refused(tmp_path):
    train, empty = write(tmp_path / "train.csv"), write(tmp_path / "dev.csv", [])
    with pytest.raises(ValueError, match=r"dev\.csv holds no rows, and dev needs some"):
        text_task(train, dev=empty)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.csv"):
        text_task(train, dev=tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="one class only"):
        text_task(write(tmp_path / "one.csv", ROWS[:1]))
    (tmp_path / "train.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"ends in \.xlsx; rows are read from \.csv, \.tsv, \.tab, \.jsonl"):
        text_task(tmp_path / "train.xlsx")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,label\nzoo,a\nriver\n", r"a\.csv, line 3: has 1 columns; the first line has 2"),
        ("a.csv", 'text,label\n"zoo,a\n', r"a\.csv, line 2: unexpected end of data"),
        ("a.jsonl", '{"text": "zoo", "label": 1}\n{"text": "zoo"\n', r"a\.jsonl, line 2 is no JSON"),
        ("a.jsonl", '["zoo", 1]\n', r"a\.jsonl, line 1 is no JSON object; got list"),
        ("a.jsonl", '{"text": null, "label": 1}\n{"text": "b", "label": 2}\n', "a text is text; got None"),
        ("a.jsonl", '{"text": "zoo", "label": null}\n', r"a\.jsonl, line 1 has no label"),
    ],
)
def test_broken_rows_are_named_by_file_and_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        text_task(tmp_path / name, dev=tmp_path / name)


def test_a_column_has_one_use():
    with pytest.raises(ValueError, match="columns of their own; got text, text"):
        Columns(label="text")
