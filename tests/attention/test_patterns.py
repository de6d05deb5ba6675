from __future__ import annotations

import json

import pytest
import torch
from tests.attention.examples import EXAMPLE_NAMES, examples

from longspan.attention import (
    DilatedSegments,
    Full,
    GlobalKeys,
    Reach,
    SlidingWindow,
    Union,
    pattern_from_dict,
)
from longspan.attention.patterns import pattern_from_parts, pattern_to_parts

MARKED = torch.tensor([[True, False, False, True]])


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_json_round_trip(name: str):
    pattern = examples(12)[name]
    assert pattern_from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_parts_keep_tensors_as_they_are(name: str):
    pattern = examples(12)[name]
    text, tensors = pattern_to_parts(pattern)
    json.loads(text)
    again = pattern_from_parts(text, tensors)
    assert again == pattern
    assert (again.extra_keys() is None) == (not tensors)


def test_dict_names_type_and_fields():
    assert SlidingWindow(256, 0).to_dict() == {"type": "sliding_window", "before": 256, "after": 0, "dilation": 1}
    assert (Full() | GlobalKeys(MARKED)).to_dict() == {
        "type": "union",
        "parts": [
            {"type": "full", "causal": False},
            {"type": "global_keys", "marked": [[True, False, False, True]], "causal": False},
        ],
    }


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"type": "banana"}, "a pattern needs a 'type' out of full, sliding_window"),
        ({}, "a pattern needs a 'type'"),
        ("full", "a pattern is a dict with a 'type'; got 'full'"),
        ({"type": "union", "parts": [{"type": "banana"}]}, "a pattern needs a 'type'"),
        ({"type": "sliding_window", "window": 3}, "has the fields before, after, dilation; got window"),
        ({"type": "sliding_window", "before": 3}, "has the fields before, after, dilation; got before"),
        ({"type": "sliding_window", "before": -3, "after": 0}, "got before=-3, after=0"),
    ],
)
def test_bad_description(description, message: str):
    with pytest.raises(ValueError, match=message):
        pattern_from_dict(description)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(-1, 0), "needs whole before >= 0 and after >= 0, in tokens per side; got before=-1"),
        (lambda: SlidingWindow(64.0, 64), r"got before=64\.0, after=64"),
        (lambda: SlidingWindow(1, 1, dilation=0), r"needs dilation >= 1 .* got 0"),
        (lambda: SlidingWindow(1, 1, dilation=()), r"needs dilation >= 1 .* got \(\)"),
        (lambda: SlidingWindow(1, 1, dilation=[1, 0]), r"got \(1, 0\)"),
        (lambda: GlobalKeys(torch.ones(2, 3)), r"needs marked as Bool\[B, N\].* got torch.float32 \[2, 3\]"),
        (lambda: GlobalKeys(torch.ones(3, dtype=torch.bool)), r"got torch.bool \[3\]"),
        (lambda: DilatedSegments((), heads=2), "at least one"),
        (lambda: DilatedSegments(((4, 0),), heads=2), r"got branches=\(\(4, 0\),\)"),
        (lambda: DilatedSegments(((4, 1, 1),), heads=2), "pair"),
        (lambda: DilatedSegments(((4, 1),), heads=0), "needs heads >= 1"),
        (lambda: DilatedSegments(((4, 1),), heads=2, offsets="odd"), "'grouped' .* or 'interleaved' .* got 'odd'"),
        (lambda: Union(()), "needs at least one pattern"),
        (lambda: Union((Full(), 3)), "nothing else"),
    ],
)
def test_wrong_arguments(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_unions_flatten():
    a, b, c = SlidingWindow(1, 1), GlobalKeys(MARKED), Full()
    assert ((a | b) | c) == (a | (b | c)) == Union((a, b, c))
    with pytest.raises(TypeError):
        a | 3  # type: ignore[operator]


def test_union_joins_the_hints_of_its_parts():
    union = SlidingWindow(4, 2, dilation=6) | SlidingWindow(1, 5, dilation=(4, 8)) | GlobalKeys(MARKED)
    assert union.reach() == Reach(24, 40, 2)
    assert torch.equal(union.extra_keys(), MARKED)
    assert union.shift_invariant()
    assert (union | Full()).reach() is None
    assert (union | DilatedSegments(((4, 1),), heads=2)).repeats
    assert not union.repeats
    other = GlobalKeys(~MARKED)
    assert (union | other).extra_keys().all()


def test_equality_and_text_do_not_need_the_tensor_to_be_the_same_object():
    assert GlobalKeys(MARKED) == GlobalKeys(MARKED.clone())
    assert GlobalKeys(MARKED) != GlobalKeys(~MARKED)
    assert GlobalKeys(MARKED) != GlobalKeys(MARKED, causal=True)
    assert GlobalKeys(MARKED) != Full()
    text = "SlidingWindow(before=2, after=0, dilation=1) | GlobalKeys(marked=Bool[1, 4], causal=True)"
    assert repr(SlidingWindow(2, 0) | GlobalKeys(MARKED, causal=True)) == text
    assert len({SlidingWindow(2, 0), SlidingWindow(2, 0), Full()}) == 2


def test_both_head_offsets_of_longnet():
    """Six heads, stride 4: the released code groups neighbouring heads, the paper deals them out."""
    grouped = DilatedSegments(((8, 4),), heads=6)
    interleaved = DilatedSegments(((8, 4),), heads=6, offsets="interleaved")
    assert [grouped.offset(head, 4) for head in range(6)] == [0, 0, 1, 2, 2, 3]
    assert [interleaved.offset(head, 4) for head in range(6)] == [0, 1, 2, 3, 0, 1]


def test_a_part_of_the_heads_sees_what_those_heads_see():
    whole = DilatedSegments(((8, 4), (12, 3)), heads=6, causal=True)
    part = DilatedSegments(((8, 4), (12, 3)), heads=6, causal=True, part=(2, 5))
    index = torch.arange(30)
    heads = torch.arange(3)[:, None, None]
    of_whole = whole.count(torch.tensor(0), heads + 2, index[:, None], index)
    assert torch.equal(part.count(torch.tensor(0), heads, index[:, None], index), of_whole)
    part.check_fits(1, 3, 30, torch.device("cpu"))
    with pytest.raises(ValueError, match="made for 3 heads but q has 6"):
        part.check_fits(1, 6, 30, torch.device("cpu"))
    for wrong in ((2, 7), (3, 3), (-1, 2)):
        with pytest.raises(ValueError, match="part is"):
            DilatedSegments(((8, 4),), heads=6, part=wrong)
