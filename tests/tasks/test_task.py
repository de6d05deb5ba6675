import numpy as np
import pytest

from longspan.tasks.task import Example, Task, grouped, label_columns, split_off, tokenize


def examples(*labels, groups=None):
    return tuple(
        Example(id=str(n), texts=(f"the zoo {n}",), label=label, group=None if groups is None else groups[n])
        for n, label in enumerate(labels)
    )


@pytest.fixture
def task():
    return Task(name="colors", labels=("red", "blue"), splits={"dev": examples(0, 1, 1), "test": examples(None)})


def test_metrics_are_accuracy_and_macro_f1_of_the_best_logit(task):
    """Two of three right; F1 of red 2 * 1 / (2 + 1), of blue the same."""
    scores = task.metrics("dev", np.array([[2.0, 1.0], [3.0, 1.0], [0.0, 1.0]]))
    assert scores == {"accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx(2 / 3)}


@pytest.mark.parametrize("shape", [(2, 2), (3, 1), (3,)])
def test_logits_that_do_not_fit_the_split_are_refused(task, shape):
    with pytest.raises(ValueError, match=r"dev of colors needs logits of shape \(3, 2\).*each of red, blue; got"):
        task.metrics("dev", np.zeros(shape))


def test_logits_that_are_no_numbers_are_refused(task):
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        task.metrics("dev", np.full((3, 2), np.nan))


def test_a_split_that_is_missing_or_empty_is_refused_with_those_there_are(task):
    empty = Task(name="colors", labels=("red", "blue"), splits={"train": (), "dev": examples(0)})
    with pytest.raises(ValueError, match="colors has no examples in its 'train' split; it has some in dev"):
        empty.examples("train")
    with pytest.raises(ValueError, match="'train' split; it has some in dev, test"):
        task.metrics("train", np.zeros((1, 2)))


def test_a_task_has_two_labels_and_no_others():
    with pytest.raises(ValueError, match=r"at least two labels.*got \['red'\]"):
        Task(name="colors", labels=("red",), splits={})
    with pytest.raises(ValueError, match=r"train of colors holds labels \{2\}; there are 2"):
        Task(name="colors", labels=("red", "blue"), splits={"train": examples(0, 2)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"texts": ()}, "example 7 has 0 texts; a row holds one or two"),
        ({"texts": ("a", None)}, "example 7: a text is text; got None"),
        ({"texts": ("ab",), "spans": ((1, 3),)}, r"example 7: span 1\.\.3 does not lie in its text of 2 characters"),
        ({"texts": ("ab", "abcd"), "spans": ((0, 1), (2, 2))}, r"span 2\.\.2 does not lie"),
    ],
)
def test_examples_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Example(id="7", **fields)


def test_label_columns_put_a_models_logits_in_the_order_of_the_task():
    logits = np.array([[1.0, 2.0, 3.0]])
    columns = label_columns(("red", "blue"), {0: "blue", 1: "green", 2: "red"})
    assert logits[:, columns].tolist() == [[3.0, 1.0]]
    assert label_columns(("red", "blue"), {0: "LABEL_0", 1: "LABEL_1"}) == [0, 1]


def test_labels_that_the_model_lacks_are_named():
    with pytest.raises(ValueError, match="the model has no label 'blue'; it tells apart 'red', 'green'"):
        label_columns(("red", "blue"), {0: "red", 1: "green"})
    with pytest.raises(ValueError, match="no label 'red', 'blue'"):
        label_columns(("red", "blue"), {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})


def test_a_seeded_sample_is_held_out_and_groups_stay_whole():
    rows = examples(*[0] * 40, groups=[str(n // 4) for n in range(40)])
    rest, held_out = split_off(rows, 0.2, seed=1)
    assert len(held_out) == 8 and len(rest) == 32
    assert not {row.group for row in rest} & {row.group for row in held_out}
    assert split_off(rows, 8, seed=1) == (rest, held_out) != split_off(rows, 8, seed=2)
    assert [int(row.id) for row in rest] == sorted(int(row.id) for row in rest)


@pytest.mark.parametrize("size", [0, 10, 0.01])
def test_holding_out_nothing_or_everything_is_refused(size):
    with pytest.raises(ValueError, match=rf"cannot hold out {size} of 10 examples"):
        split_off(examples(*[0] * 10), size)


def test_rows_without_a_group_are_alone():
    rows = [Example(id="a", texts=("x",)), Example(id="b", texts=("x",), group="a")]
    assert grouped(rows) == [[rows[0]], [rows[1]]]


def test_rows_are_what_the_tokenizer_gives_with_the_label(tokenizer):
    rows = [
        Example(id="0", texts=("the zoo", "old town river"), label=1),
        Example(id="1", texts=("the", "red zebra")),
    ]
    features = tokenize(rows, tokenizer)
    for row, feature in zip(rows, features, strict=True):
        encoded = dict(tokenizer(*row.texts))
        assert {name: feature[name] for name in encoded} == encoded
        assert set(encoded) == {"input_ids", "attention_mask", "token_type_ids"}
    assert features[0]["labels"] == 1
    assert "labels" not in features[1]
    assert tokenize([], tokenizer) == []


def test_the_longer_text_of_a_pair_loses_its_end(tokenizer):
    row = Example(id="0", texts=("red green", "the old zoo is near the river"))
    ids = tokenize([row], tokenizer, 8)[0]["input_ids"]
    assert tokenizer.decode(ids) == "[CLS] red green [SEP] the old zoo [SEP]"


def test_rows_longer_than_the_tokenizers_limit_are_whole_unless_cut(tokenizer, recwarn):
    row = Example(id="0", texts=("zoo " * 200,))
    assert len(tokenize([row], tokenizer)[0]["input_ids"]) == 202 > tokenizer.model_max_length
    assert len(tokenize([row], tokenizer, 100)[0]["input_ids"]) == 100
    assert not recwarn.list


def test_spans_come_as_the_tokens_that_overlap_them(tokenizer):
    """In a pair the first lies in the first text; with one text both lie in it. "zebras" is more than one token."""
    first, second = "the red zebras lived", "bob is a zebras"
    pair = Example(id="0", texts=(first, second), spans=((8, 14), (9, 15)))
    one = Example(id="1", texts=(first,), spans=((0, 3), (8, 14)))
    for example, words in ((pair, ["zebras", "zebras"]), (one, ["the", "zebras"])):
        feature = tokenize([example], tokenizer)[0]
        found = [tokenizer.decode(feature["input_ids"][start:end]) for start, end in feature["span_ranges"]]
        assert [text.replace(" ", "").replace("##", "") for text in found] == words
    assert tokenize([pair], tokenizer)[0]["span_ranges"][1][0] > feature["input_ids"].index(3)


def test_a_span_that_was_cut_off_is_refused(tokenizer):
    example = Example(id="9", texts=("the old zoo is near the river",), spans=((0, 3), (24, 29)))
    with pytest.raises(ValueError, match="example 9: the 5 tokens that are kept do not reach its span 'river'"):
        tokenize([example], tokenizer, 5)


def test_spans_want_padding_on_the_right(tokenizer):
    example = Example(id="9", texts=("the zoo",), spans=((0, 3),))
    tokenizer.padding_side = "left"
    try:
        with pytest.raises(ValueError, match="pads on the right"):
            tokenize([example], tokenizer)
    finally:
        tokenizer.padding_side = "right"


def test_one_text_and_two_do_not_mix(tokenizer):
    rows = [Example(id="0", texts=("a",)), Example(id="1", texts=("a", "b"))]
    with pytest.raises(ValueError, match="cannot stand in the same rows"):
        tokenize(rows, tokenizer)
