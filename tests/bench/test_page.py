"""The pages of benchmarks and recipes quote result files and nothing else."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
RECIPES = ROOT / "docs" / "recipes.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture
def tables(tmp_path):
    """docs/tables.py with an empty project around it."""
    functions = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    functions["render"].__globals__["ROOT"] = tmp_path
    (tmp_path / "results").mkdir()
    return functions


def row(system, case="forward, fp32", **fields):
    defaults = {"precision": "fp32", "ours": False, "status": "ok", "median_ms": 20.0, "speedup": {}}
    defaults |= {"share_of_gemm": None, "relative_error": 1e-6, "tolerance": 1e-5, "peak_mib": None}
    return {"case": case, "system": system} | defaults | fields


def save(folder, name, *rows, goals=()):
    measured = {
        "topic": name.rsplit("_", 1)[1],
        "command": "longspan bench attention",
        "commit": "abc1234",
        "date": "2026-01-02",
        "machine": {"cpu": "A CPU", "threads": 2, "instruction_set": "amx"},
        "versions": {"torch": "2.13.0", "longspan": "0.2.0", "openvino": None},
        "goals": list(goals),
        "rows": list(rows),
    }
    (folder / "results" / f"{name}.json").write_text(json.dumps(measured))


@pytest.mark.parametrize("page", [PAGE, RECIPES], ids=["benchmarks", "recipes"])
def test_the_pages_are_what_the_result_files_say(page):
    text = page.read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "tables.py"))["with_tables"](text, page) == text


def test_the_page_of_recipes_has_a_table_for_each():
    from longspan.cli.recipe import app

    commands = {command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"<!-- table: recipe-(\w+) -->", RECIPES.read_text(encoding="utf-8"))) == commands


def test_the_page_has_a_table_for_every_benchmark():
    from longspan.bench.cases import GOALS

    quoted = set(re.findall(r"<!-- table: ([\w-]+) -->", TEXT))
    assert quoted == {"goals", "bench-encoder-base", *GOALS}


@pytest.mark.parametrize("page", [PAGE, RECIPES], ids=["benchmarks", "recipes"])
def test_their_local_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_times_speedups_and_refusals_are_shown(tables, tmp_path):
    save(
        tmp_path,
        "2026-01-02_cpu_bench-attention",
        row(
            "ours",
            ours=True,
            median_ms=5.004,
            speedup={"stock fp32": 4.0, "dense fp32": 2.0, "flex fp32": 3.0},
            share_of_gemm=0.76,
        ),
        row("stock"),
        row("dense", status="failed tolerance", median_ms=None, relative_error=0.5),
    )
    shown = tables["render"]("bench-attention", tmp_path / "docs" / "page.md")
    assert "| ours | 5 (2.00x, 76% of GEMM) | 1.0e-06, 1e-05 |" in shown
    assert "| stock | 20 | 1.0e-06, 1e-05 |" in shown
    assert "| dense | failed tolerance | 5.0e-01, 1e-05 |" in shown
    assert "A CPU, 2 threads, kernels for amx, commit abc1234, 2026-01-02; torch 2.13.0 ([file](../results/" in shown


def test_memory_has_a_table_of_its_own(tables, tmp_path):
    peak = {"median_ms": None, "tolerance": None, "relative_error": None}
    save(
        tmp_path,
        "2026-01-02_cpu_bench-attention",
        row("ours"),
        row("ours", "memory, 4,096 tokens", peak_mib=4.2, **peak),
        row("chunks", "memory, 4,096 tokens", status="left out", **peak),
    )
    shown = tables["render"]("bench-attention", tmp_path / "page.md")
    assert "| MiB | memory, 4,096 tokens |\n|---|---:|\n| ours | 4 |\n| chunks | left out |" in shown


def test_goals_come_from_the_newest_file_of_each_benchmark(tables, tmp_path):
    goal = {"what": "int8", "reach": 11, "at_most": False, "measured": 12.34, "unit": "x", "met": True}
    save(tmp_path, "2026-01-02_cpu_bench-dense", goals=[goal | {"measured": 9.0, "met": False}])
    save(
        tmp_path,
        "2026-01-03_cpu_bench-dense",
        goals=[goal, goal | {"what": "error", "at_most": True, "unit": "", "reach": 0.02, "measured": 0.011}],
    )
    shown = tables["render"]("goals", tmp_path / "page.md")
    assert "| benchmark | goal | reach | A CPU, amx |" in shown
    assert "| bench-dense | int8 | ≥ 11x | 12.3x, reached |" in shown
    assert "| bench-dense | error | ≤ 0.02 | 0.011, reached |" in shown
    assert "9" not in shown.replace("bench", "")


def test_machines_stand_beside_each_other(tables, tmp_path):
    goal = {"what": "int8", "reach": 11, "at_most": False, "measured": 12.34, "unit": "x", "met": True}
    save(tmp_path, "2026-01-02_one_bench-dense", row("ours"), goals=[goal])
    save(tmp_path, "2026-01-01_other_bench-dense", row("theirs"), goals=[goal | {"measured": 9.0, "met": False}])
    path = tmp_path / "results" / "2026-01-01_other_bench-dense.json"
    path.write_text(path.read_text().replace("A CPU", "B CPU"))
    goals, table = (tables["render"](topic, tmp_path / "page.md") for topic in ("goals", "bench-dense"))
    assert "| int8 | ≥ 11x | 12.3x, reached | 9x, not reached |" in goals
    assert table.index("| ours |") < table.index("A CPU") < table.index("| theirs |") < table.index("B CPU")


def test_what_was_not_measured_says_how(tables, tmp_path):
    assert tables["render"]("bench-dense", tmp_path / "page.md") == "Not measured yet: `longspan bench dense`.\n"


def test_layers_are_shown_by_length(tables, tmp_path):
    def layer(tokens, backward, precision="fp32", **fields):
        shape = {"layer": "LongNet", "tokens": tokens, "backward": backward}
        return row("longspan", ours=True, shape=shape, precision=precision, peak_mib=tokens / 512) | fields

    save(
        tmp_path,
        "2026-01-02_cpu_bench-scaling",
        layer(1024, False, speedup={"dense SDPA fp32": 0.5}),
        layer(8192, False),
        layer(8192, False, "bf16"),
        layer(8192, True, status="left out", median_ms=None),
    )
    shown = tables["render"]("bench-scaling", tmp_path / "page.md")
    assert shown.startswith(
        "| LongNet layer, tokens | forward, fp32: µs/token (over dense SDPA), KiB/token | forward, bf16"
    )
    assert "| 1,024 | 19.5 (0.50x) |  |  |" in shown
    assert "| 8,192 | 2.44, 2 | 2.44, 2 | left out |" in shown


def test_character_models_are_shown_with_their_ablations_and_compressors(tables, tmp_path):
    def model(name, bits, ablation=False):
        sizes = {"parameters": 3_200_000, "tokens": 14_000_000, "length": 8192, "operations": 3.2e14}
        costs = {"tokens_per_second": 8123.4, "minutes": 28.7, "peak_memory_gib": 1.3}
        gains = {"gain": 0.0612, "gain_error": 0.0049}
        return {"name": name, "ablation": ablation, "bits": bits} | sizes | costs | gains

    result = {
        "config": {"lengths": [512, 8192]},
        "evaluated": {"scored": 256, "stretches": 128},
        "rows": [
            model("LongNet", {"512": 2.0, "8192": 1.9388}),
            model("full", {"512": 2.1, "8192": None}),
            model("windows equal", {"512": None, "8192": 2.2}, ablation=True),
        ],
        "references": [{"name": "gzip", "bits": 2.55, "note": "level 9"}],
    }
    machine = {"cpu": "A CPU", "threads": 1, "torch": "2.13.0"}
    measured = {"command": "longspan recipe characters OUT", "machine": machine, "result": result}
    measured["note"] = "On a busy machine."
    (tmp_path / "results" / "2026-01-02_cpu_recipe-characters.json").write_text(json.dumps(measured))
    shown = tables["render"]("recipe-characters", tmp_path / "docs" / "page.md")
    assert "| LongNet | 2.000 | 1.939 | 0.061 ± 0.005 |" in shown
    assert "| full | 2.100 | - | 0.061 ± 0.005 |" in shown
    assert "| full | 3.2 M | 14.0 M of 8,192 | 0.320 | 8,123 | 29 | 1.3 |" in shown
    assert "| windows equal | 14.0 M | 2.200 |" in shown
    assert "| gzip | 2.550 |\n" in shown
    assert shown.endswith(" On a busy machine.\n")
    assert "`longspan recipe characters OUT`: 128 stretches of 256 characters, A CPU, 1 thread, torch 2.13.0" in shown
