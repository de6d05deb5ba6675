"""What the README promises is what the repository holds."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_result_files():
    with_tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))["with_tables"]

    assert "<!-- table: " in TEXT
    assert with_tables(TEXT) == TEXT


@pytest.mark.parametrize("command", ["make run", "make test"])
def test_commands_are_targets_of_the_makefile(command):
    assert f"\n{command.split()[1]}: " in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert command in TEXT


def test_local_links_lead_somewhere():
    import re

    for link in re.findall(r"\]\((?!https?:)([^)#]+)", TEXT):
        assert (ROOT / link).exists(), link
