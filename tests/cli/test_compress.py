import csv

import pytest
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from longspan.cli import main
from longspan.models import LongspanForSequenceClassification


@pytest.fixture(autouse=True)
def _transformers_stays_as_loud_as_it_was():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A teacher, another student, and a file with a row for each word."""
    folder = tmp_path_factory.mktemp("compress")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=64,
        id2label={0: "city", 1: "water"},
        label2id={"city": 0, "water": 1},
    )
    BertForSequenceClassification(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    rows = [
        (f"the {word} is near the {word} {end}", label)
        for end in "abcdefgh"
        for word, label in (("town", "city"), ("river", "water"))
    ]
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return folder


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit.value.code or 0, captured.out, captured.err


def test_a_classifier_is_distilled_and_pruned(folder, capsys):
    train = ("--train", folder / "rows.csv")
    options = ("--layers", 2, "--epochs", 1, "--batch", 4, "--hidden-states", 1, "--layer-map", "1:2,2:3", "--no-bf16")
    code, out, err = run(capsys, "distill", folder / "teacher", folder / "student", *train, *options)
    assert code == 0, err
    assert "dev, teacher: accuracy" in out and "dev, student: accuracy" in out
    code, out, err = run(
        capsys, "prune", folder / "student" / "model", folder / "small", *train, "--heads", 2, "--ffn", 10, "--rows", 6
    )
    assert code == 0, err
    assert "heads x units a layer: 2 x 10, 2 x 10" in out and "dev after: accuracy" in out
    small = LongspanForSequenceClassification.from_pretrained(folder / "small")
    assert [(block.heads, block.ffn_width) for block in small.config.encoder_config.blocks] == [(2, 10)] * 2
    assert small.config.id2label == {0: "city", 1: "water"}
    code, _, err = run(capsys, "prune", folder / "teacher", folder / "small", *train, "--heads", 2)
    assert code == 2 and "exists and is not an empty directory" in err
    code, out, err = run(
        capsys, "distill", folder / "teacher", folder / "again", *train, "--student", folder / "small", "--steps", 2,
        "--no-bf16",
    )  # fmt: skip
    assert code == 0, err
    code, out, err = run(capsys, "prune", folder / "teacher", folder / "fast", *train, "--speedup", 1)
    assert code == 0 and "4 x 24, 4 x 24, 4 x 24" in out, err


def test_a_classifier_hears_ngrams(folder, capsys):
    train = ("--train", folder / "rows.csv", "--buckets", 512)
    code, out, err = run(capsys, "add-ngrams", folder / "teacher", folder / "alone", *train)
    assert code == 0 and "dev before: accuracy" in out, err
    code, out, err = run(
        capsys, "add-ngrams", folder / "teacher", folder / "taught", *train, "--teacher", folder / "teacher"
    )
    assert code == 0 and "dev after: accuracy 1.0000" in out, err  # one word tells the label
    assert list((folder / "taught-teacher").glob("*/*.safetensors"))
    heard = LongspanForSequenceClassification.from_pretrained(folder / "taught")
    assert heard.ngrams.weight.shape == (512, 2) and heard.config.id2label == {0: "city", 1: "water"}
    code, _, err = run(capsys, "add-ngrams", folder / "teacher", folder / "alone", *train)
    assert code == 2 and "exists and is not an empty directory" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add-ngrams", "teacher", "new"], "name either a --task or a file"),
        (["prune", "teacher", "new", "--heads", "0", "--train", "rows.csv"], "heads must be at least 1 a layer"),
        (["prune", "teacher", "new", "--heads", "9", "--train", "rows.csv"], "cannot keep 9 heads a layer"),
        (["prune", "teacher", "new", "--train", "rows.csv"], "nothing to prune"),
        (["prune", "teacher", "new", "--heads", "1"], "name either a --task or a file"),
        (["distill", "teacher", "new", "--train", "rows.csv"], "either a student to begin with"),
        (["distill", "teacher", "new", "--train", "rows.csv", "--layers", "9"], "1 to 3 student layers"),
        (["distill", "teacher", "new", "--train", "rows.csv", "--layers", "1", "--layer-map", "1:x"], "1:4,2:8,3:12"),
        (["distill", "teacher", "new", "--layers", "1"], "name either a --task or a file"),
    ],
)
def test_mistakes_are_named(folder, capsys, arguments, message):
    arguments = [folder / name if name in ("teacher", "new", "rows.csv") else name for name in arguments]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err
    assert not (folder / "new").exists()
