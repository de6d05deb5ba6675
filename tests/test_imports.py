"""Who may import whom. The arrows of ARCHITECTURE.md, read from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import longspan

SOURCE = Path(longspan.__file__).parent
ATTENTION = sorted((SOURCE / "attention").rglob("*.py"))
BACKENDS = sorted((SOURCE / "attention" / "backends").glob("*.py"))


def imported_modules(file: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it; `from package import module` gives both."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def ids(files: list[Path]) -> list[str]:
    return [str(file.relative_to(SOURCE)) for file in files]


@pytest.mark.parametrize("file", ATTENTION, ids=ids(ATTENTION))
def test_attention_imports_torch_the_kernels_and_itself_only(file: Path):
    allowed = {"torch", *sys.stdlib_module_names}
    if file.name == "draw.py":
        allowed.add("matplotlib")
    if file.name in ("native.py", "lanes.py"):
        allowed.add("numpy")
    for module in imported_modules(file):
        ours = module == "longspan" or module.startswith(("longspan.attention", "longspan.kernels"))
        assert ours or module.split(".")[0] in allowed, module


@pytest.mark.parametrize("file", BACKENDS, ids=ids(BACKENDS))
def test_backend_imports_neither_attend_nor_the_reference(file: Path):
    modules = imported_modules(file)
    assert not any(module.startswith("longspan.attention.attend") for module in modules)
    if file.name != "__init__.py":
        assert not any(module.startswith("longspan.attention.backends.reference") for module in modules)


def test_patterns_know_no_backend():
    modules = imported_modules(SOURCE / "attention" / "patterns.py")
    assert not any(module.startswith("longspan") for module in modules)


def test_drop_in_modules_do_without_the_models_until_an_input_is_long():
    tree = ast.parse((SOURCE / "nn.py").read_text())
    first = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not any(module.startswith("longspan.models") for module in first)
    for module in imported_modules(SOURCE / "nn.py"):
        ours = module.startswith(("longspan.attention", "longspan.models.blockwise"))
        assert ours or module.split(".")[0] in {"torch", *sys.stdlib_module_names}, module
