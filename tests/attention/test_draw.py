from __future__ import annotations

import sys

import pytest
import torch
from tests.attention.examples import EXAMPLE_NAMES, examples

from longspan.attention import DilatedSegments, Full, GlobalKeys, SlidingWindow, draw, draw_picture


def test_window_and_global_key_as_text():
    marked = torch.tensor([[True, False, False, False, False]])
    assert draw(SlidingWindow(1, 0) | GlobalKeys(marked), 5, ascii_only=True).splitlines() == [
        "# . . . .",
        "# # . . .",
        "# # # . .",
        "# . # # .",
        "# . . # #",
    ]


def test_keys_that_count_twice_are_digits():
    pattern = DilatedSegments(((2, 1), (4, 2)), heads=2)
    assert draw(pattern, 4).splitlines() == ["2 ■ ■ ·", "■ ■ · ·", "■ · 2 ■", "· · ■ ■"]
    assert draw(pattern, 4, head=1).splitlines() == ["■ ■ · ·", "■ 2 · ■", "· · ■ ■", "· ■ ■ 2"]


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_every_pattern_draws(name: str):
    lines = draw(examples(24)[name], 24, batch=1, head=2).splitlines()
    assert len(lines) == 24
    assert {len(line) for line in lines} == {47}


@pytest.mark.parametrize("tokens", [0, 201])
def test_text_has_room_for_so_many_tokens(tokens: int):
    with pytest.raises(ValueError, match=f"1 to 200 tokens to fit the screen; got {tokens}; try draw_picture"):
        draw(Full(), tokens)


def test_pattern_made_for_other_tokens():
    with pytest.raises(ValueError, match="was made for 24 tokens; got 10"):
        draw(examples(24)["global"], 10)


def test_picture_shows_the_counts(tmp_path):
    pytest.importorskip("matplotlib")
    axes = draw_picture(SlidingWindow(1, 1), 6)
    assert axes.images[0].get_array().sum() == 16
    axes.figure.savefig(tmp_path / "pattern.png")
    assert (tmp_path / "pattern.png").stat().st_size > 1000
    assert draw_picture(Full(), 3, axes=axes) is axes


def test_picture_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install longspan\[plot\]"):
        draw_picture(Full(), 4)
