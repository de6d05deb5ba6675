import json
from pathlib import Path

import numpy as np
import pytest
from tests.tasks.superglue_rows import ROWS, write_superglue

from longspan.tasks.superglue import FORMATS, predictions, superglue_task, write_predictions

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_superglue(tmp_path_factory.mktemp("superglue"), without_labels=True)


def perfect(task, split):
    """Logits that are right everywhere."""
    labels = [example.label for example in task.examples(split)]
    return np.eye(len(task.labels))[labels]


def spans_of(example):
    return [example.texts[n % len(example.texts)][start:end] for n, (start, end) in enumerate(example.spans)]


@pytest.mark.parametrize("name", FORMATS)
def test_right_answers_score_one_and_come_out_as_the_labels_that_came_in(name, folder):
    task = superglue_task(name, folder)
    assert set(task.splits) == {"train", "dev", "test"}
    scores = task.metrics("dev", perfect(task, "dev"))
    assert scores[task.metric] == 1
    rows = ROWS[FORMATS[name].folder]
    found = list(predictions(task, "dev", perfect(task, "dev")))
    if name in ("cb", "rte", "copa"):
        assert found == [{"idx": row["idx"], "label": row["label"]} for row in rows]
    if name in ("boolq", "wic"):
        assert found == [{"idx": row["idx"], "label": str(row["label"]).lower()} for row in rows]
    if name == "wsc":
        assert found == [{"idx": 14, "label": "False"}]
    if name == "record":
        assert found == [{"idx": 31, "label": "Ann Lee"}, {"idx": 32, "label": "Oslo"}]
    if name == "multirc":
        answers = [
            {"idx": 8, "answers": [{"idx": 20, "label": 1}, {"idx": 21, "label": 0}]},
            {"idx": 9, "answers": [{"idx": 22, "label": 1}, {"idx": 23, "label": 0}]},
        ]
        assert found == [{"idx": 2, "passage": {"questions": answers}}]


@pytest.mark.parametrize("name", FORMATS)
def test_the_test_split_has_no_labels_and_only_predictions_come_out(name, folder, tmp_path):
    task = superglue_task(name, folder)
    assert {example.label for example in task.examples("test")} == {None}
    assert [example.texts for example in task.examples("test")] == [example.texts for example in task.examples("dev")]
    with pytest.raises(ValueError, match=r"have no label.*write predictions instead"):
        task.metrics("test", perfect(task, "dev"))
    path = write_predictions(task, "test", perfect(task, "dev"), tmp_path / "predictions")
    assert path.name == f"{FORMATS[name].folder}.jsonl"
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == list(predictions(task, "dev", perfect(task, "dev")))
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name]


def test_texts_and_spans_are_what_the_task_asks_about(folder):
    texts = {name: superglue_task(name, folder).examples("train")[0].texts for name in FORMATS}
    assert texts["boolq"] == ("is the zoo old", "Zoo -- The zoo is old.")
    assert texts["copa"] == ("The glass broke because", "It fell.")
    assert superglue_task("copa", folder).examples("train")[3].texts == ("The sun rose so", "It got warm.")
    assert texts["multirc"] == ("Who wrote? Alice", "Alice wrote the report near the river.")
    assert texts["record"][0] == "The meeting in Rome pleased Ann Lee."
    assert "@highlight" not in texts["record"][1]
    assert spans_of(superglue_task("wic", folder).examples("train")[0]) == ["feel", "felt"]


def test_words_of_wsc_are_found_where_case_punctuation_and_numbers_are_off(folder):
    """The first "old man" stands at word 0, the second at word 10; the file says 9 and writes another case."""
    example = superglue_task("wsc", folder).examples("train")[0]
    assert spans_of(example) == ["the old man", "him"]
    assert example.spans[0][0] > 40


def test_an_entity_that_occurs_twice_is_one_candidate(folder):
    task = superglue_task("record", folder)
    groups = {}
    for example in task.examples("train"):
        groups.setdefault(example.group, []).append((example.answer, example.label))
    assert groups == {
        "11/31": [("Ann Lee", 1), ("Bob Ray", 0), ("Rome", 0), ("Oslo", 0)],
        "11/32": [("Ann Lee", 0), ("Bob Ray", 0), ("Rome", 0), ("Oslo", 1)],
    }


def test_a_folder_of_one_task_will_do(folder):
    assert superglue_task("RTE", folder / "RTE").labels == ("entailment", "not_entailment")


def test_folders_without_the_task_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds none of train\.jsonl.*no folder BoolQ"):
        superglue_task("boolq", tmp_path)
    with pytest.raises(ValueError, match="no task 'qqp'; it has boolq, cb"):
        superglue_task("qqp", tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("boolq", {"question": None, "passage": 1}, "a text is text; got None"),
        ("cb", {"label": "maybe"}, "'maybe' is none of entailment, contradiction, neutral"),
        ("copa", {"question": "why"}, "'why' is neither 'cause' nor 'effect'"),
        ("copa", {"label": 2}, "label 2 is none of 0 to 1"),
        ("wic", {"end1": 99}, "span 12..99 does not lie in its text of 21 characters"),
        ("wsc", {"target": {"span1_index": 0, "span1_text": "zebra", "span2_index": 0, "span2_text": "him"}}, "zebra"),
    ],
)
def test_a_row_that_is_wrong_is_named_by_file_and_line(name, change, message, tmp_path):
    form = FORMATS[name]
    row = ROWS[form.folder][0]
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | change)}\n")
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 2 .*{message}"):
        superglue_task(name, tmp_path)


def test_a_row_that_lacks_a_field_names_it(tmp_path):
    (tmp_path / "val.jsonl").write_text('{"premise": "a", "idx": 0}\n')
    with pytest.raises(ValueError, match=r"val\.jsonl, line 1 has no 'hypothesis'"):
        superglue_task("rte", tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_the_published_files_are_read(name):
    if not SHARED.is_dir():
        pytest.skip("reads real files of the data set, which the project does not carry; others test all eight formats")
    task = superglue_task(name, SHARED / "fewglue")
    assert len({example.group or example.id for example in task.examples("train")}) >= 32
    assert task.metrics("train", perfect(task, "train"))[task.metric] == 1
    assert all(all(spans_of(example)) for example in task.examples("train"))
