"""What holds for the project as a whole: what an import loads, what may import what, and what no file may say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

import longspan

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "longspan"

# Each folder with the folders that it may import; torch and the like aside.
MAY_IMPORT = {
    "kernels": set(),
    "attention": {"kernels"},
    "distributed": {"models", "attention"},
    "models": {"attention", "kernels"},
    "planning": {"models", "attention"},
    "inference": {"models", "attention", "kernels"},
    "training": {"distributed", "inference", "models", "attention", "kernels"},
    "compression": {"training", "inference", "models", "attention", "kernels"},
    "tasks": {"compression", "training", "inference", "models", "attention", "kernels"},
    "recipes": {"tasks", "compression", "training", "inference", "models", "attention", "kernels"},
    "bench": {"inference", "models", "attention", "kernels"},
    "cli": {
        "bench",
        "planning",
        "recipes",
        "tasks",
        "compression",
        "training",
        "distributed",
        "inference",
        "models",
        "attention",
        "kernels",
    },
}
ANYONE_MAY_IMPORT = {"errors", "__version__"}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; name the module in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_importing_longspan_loads_nothing_heavy():
    loaded = run_python("import sys, longspan; print(*sys.modules)")
    assert not {"torch", "transformers", "numpy", "onnxruntime", "ray", "rich", "typer"} & set(loaded)


def test_the_attention_core_loads_torch_only():
    loaded = run_python("import sys, longspan; longspan.attend; print(*sys.modules)")
    assert "torch" in loaded
    assert not {"transformers", "tokenizers", "onnxruntime", "ray"} & set(loaded)


@pytest.mark.parametrize("name", longspan.__all__)
def test_every_public_name_exists_and_says_what_it_gives(name):
    assert getattr(longspan, name).__doc__
    assert name in dir(longspan)


def test_type_checkers_see_the_public_names():
    block = next(node for node in ast.parse(Path(longspan.__file__).read_text()).body if isinstance(node, ast.If))
    assert {alias.asname for node in block.body for alias in node.names} == set(longspan.__all__)
    assert {f"{node.module}.{node.names[0].name}" for node in block.body} == {
        f"{home}.{name}" for name, home in longspan._HOME.items()
    }


def test_unknown_names_are_refused_by_name():
    with pytest.raises(AttributeError, match="no attribute 'atend'"):
        longspan.atend  # noqa: B018


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*/**/*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_follow_the_arrows(path):
    folder = path.relative_to(SOURCE).parts[0]
    ours = {name.split(".")[1] for name in imported_modules(path) if name.startswith("longspan.")}
    assert ours <= MAY_IMPORT[folder] | {folder} | ANYONE_MAY_IMPORT


def test_every_folder_has_its_place_in_the_flow():
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT)


def test_attention_imports_torch_numpy_and_the_standard_library_only():
    outside = {name.split(".")[0] for path in (SOURCE / "attention").rglob("*.py") for name in imported_modules(path)}
    drawing = {"matplotlib"}  # imported when a picture is asked for
    assert outside - set(sys.stdlib_module_names) <= {"torch", "numpy", "longspan"} | drawing


def test_the_version_is_one():
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert metadata["tool"]["scikit-build"]["metadata"]["version"]["input"] == "src/longspan/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", longspan.__version__)


def test_every_tested_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    wanted = {re.match(r"[\w-]+", name)[0].lower() for name in project["dependencies"] + extras} - {"longspan"}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert wanted <= pinned


def test_no_file_names_the_machine_it_was_written_on():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\n"):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".json", ""} and path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/(work|home|root|Users)/\w", text), name
