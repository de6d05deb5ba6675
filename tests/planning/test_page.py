"""The page about a billion tokens shows what plans and counts give."""

import re
import runpy
from pathlib import Path

import pytest

from longspan.planning.attention import Heads, Ranks, load_of

PAGE = Path(__file__).parents[2] / "docs" / "billion.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(PAGE.with_suffix(".py")))


def test_its_plans_are_what_the_commands_print(script):
    assert script["with_parts"](TEXT, plans=script["plans"]()) == TEXT


def test_its_counts_are_what_the_plan_computes(script):
    """So the table, whose counted and planned figures are equal, can be made of plans alone."""
    tokens_per_rank, heads = script["TOKENS_PER_RANK"], Heads(script["HEADS"], script["WIDTH"], 4)
    planned = {}
    for world in script["RANKS"]:
        pattern = script["longnet"](world * tokens_per_rank, tokens_per_rank, script["KEPT"], heads.count)
        loads = [load_of(pattern, Ranks(world * tokens_per_rank, world), rank, heads) for rank in range(world)]
        planned[world] = [script["Measured"](load.pairs, load.sent, load.returned) for load in loads]
    assert script["with_parts"](TEXT, measured=script["table"](planned)) == TEXT


def test_its_local_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", TEXT):
        assert (PAGE.parent / link).exists(), link
