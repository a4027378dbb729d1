"""The table of who may import whom, read from the sources: a new arrow between two folders is nobody's accident."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

MAY_IMPORT = {
    "protocol": set(),
    "text": {"protocol"},
    "native": set(),
    "engine": {"protocol", "text", "native"},
    "transfer": {"protocol", "native"},
    "prefill": {"engine", "transfer", "protocol"},
    "decode": {"engine", "transfer", "protocol"},
    "router": {"protocol", "text"},
    "cluster": {"protocol", "text", "native", "engine", "transfer", "prefill", "decode", "router"},
}
"""Which of our packages each of them may import, besides itself."""

NEVER_IMPORTED_BY = {
    "ray": set(MAY_IMPORT) - {"cluster"},
    "torch": {"protocol", "text", "native", "router"},
    "transformers": set(MAY_IMPORT) - {"engine"},
    "starlette": set(MAY_IMPORT) - {"router", "cluster"},
    "socket": {"engine", "prefill", "decode"},
    "asyncio": {"engine", "prefill", "decode"},
}
"""Libraries that some packages must do without."""

DEVICE_MODULES = {"flashinfer", "mooncake", "triton", "pynvml"}
"""Modules that are there on some machines only: imported inside functions, each in one file."""


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(top-level name of every module that a file imports, whether it does so when it is imported itself)."""
    return list(_imports(path))


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    tree = ast.parse(path.read_text(), str(path))
    lazy = {id(node) for function in ast.walk(tree) if _defers(function) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module or ""]
        else:
            continue
        for name in names:
            yield name.split(".")[0], id(node) not in lazy


def _defers(node: ast.AST) -> bool:
    """Functions run later; a TYPE_CHECKING block never does."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name):
        return node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def files_of(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_the_table_allows(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    for path in files_of(package):
        ours = {name for name, _ in imports(path)} & (set(MAY_IMPORT) | {"tests", "benchmarks", "deploy"})
        assert ours <= allowed, f"{path.relative_to(REPOSITORY)} imports {sorted(ours - allowed)}"


@pytest.mark.parametrize("library", NEVER_IMPORTED_BY)
def test_a_library_stays_out_of_the_packages_that_must_do_without_it(library: str) -> None:
    for package in NEVER_IMPORTED_BY[library]:
        for path in files_of(package):
            assert library not in {name for name, _ in imports(path)}, f"{path.relative_to(REPOSITORY)}: {library}"


def test_device_modules_are_imported_lazily_and_in_one_place() -> None:
    places: dict[str, list[str]] = {}
    for package in MAY_IMPORT:
        for path in files_of(package):
            for name, at_import in imports(path):
                if name in DEVICE_MODULES:
                    assert not at_import, f"{path.relative_to(REPOSITORY)} imports {name} when it is imported"
                    places.setdefault(name, []).append(str(path.relative_to(REPOSITORY)))
    for name, paths in places.items():
        assert len(set(paths)) == 1, f"{name} is imported in {sorted(set(paths))}"


LIGHT = {
    "cluster.launch": ["torch", "transformers", "ray", "pydantic"],
    "native.library": ["torch", "ray"],
    "transfer.dist.transport": ["torch", "ray"],
    "transfer.dist.door": ["torch", "ray"],
    "router.app": ["torch", "transformers", "ray"],
    "cluster.app": ["torch", "transformers"],
    "cluster.router": ["torch", "transformers"],
}
"""What modules of processes that must start quickly do without, the most abstemious first: one process imports all."""


def test_processes_that_must_start_quickly_do_not_load_heavy_libraries() -> None:
    """What a module imports, everything behind it included."""
    code = f"""
import importlib, sys
for module, libraries in {LIGHT!r}.items():
    importlib.import_module(module)
    print(*(f"{{module}} loads {{name}}" for name in libraries if name in sys.modules), end="")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == ""
