"""Compiling C and C++: once, safely against a race, anew when anything changes, and what happens where it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from native.compiler import CPP, C, NativeUnavailable, find_compiler
from native.library import Recipe, build_library, load_library, open_library

REPOSITORY = Path(__file__).resolve().parents[2]
IN_THE_PROCESS = {"PATH": os.environ.get("PATH", os.defpath)}
BUILD = """
import sys
from pathlib import Path
from native.compiler import C
from native.library import Recipe, build_library
print(build_library(Recipe(source=Path(sys.argv[1]), language=C, flags=("-O1",))))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A library of one function, `answer`."""
    if find_compiler(C, IN_THE_PROCESS) is None:
        pytest.skip("no C compiler here")
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    source = folder / "answer.c"
    source.write_text(
        '#include "answer.h"\n__attribute__((visibility("default"))) int answer(void) { return ANSWER; }\n'
    )
    return Recipe(source=source, language=C, flags=("-O1",))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**IN_THE_PROCESS, "XDG_CACHE_HOME": str(tmp_path / "cache")}


def noting_compiler(folder: Path) -> tuple[dict[str, str], Path]:
    """Variables that name a compiler which notes each compilation in a file before it runs the real one."""
    log, script = folder / "compilations", folder / "compiler"
    script.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo x >> {log};; esac\nexec cc "$@"\n')
    script.chmod(0o755)
    return {"CC": str(script)}, log


def test_compiles_once_for_one_machine(recipe: Recipe, environment: dict[str, str], tmp_path: Path) -> None:
    noting, log = noting_compiler(tmp_path)
    first = build_library(recipe, environment=environment | noting)
    assert build_library(recipe, environment=environment | noting) == first
    assert log.read_text().count("x") == 1
    assert list(first.parent.iterdir()) == [first], "nothing of the build is left behind"
    assert open_library(first).answer() == 42


def test_processes_may_race(recipe: Recipe, environment: dict[str, str], tmp_path: Path) -> None:
    noting, log = noting_compiler(tmp_path)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, str(recipe.source)],
            cwd=REPOSITORY,
            env=environment | noting,
            stdout=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    paths = {racer.communicate(timeout=120)[0].decode().strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0] * len(racers)
    assert log.read_text().count("x") == 1, "the others waited for the library"
    (path,) = paths
    assert [entry.name for entry in Path(path).parent.iterdir()] == [Path(path).name]


def change_header(recipe: Recipe) -> Recipe:
    recipe.source.with_name("answer.h").write_text("#define ANSWER 43\n")
    return recipe


def change_source(recipe: Recipe) -> Recipe:
    recipe.source.write_text(recipe.source.read_text().replace("ANSWER;", "ANSWER + 1;"))
    return recipe


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (change_header, 43),
        (change_source, 43),
        (lambda recipe: replace(recipe, flags=("-O2",)), 42),
        (lambda recipe: replace(recipe, links=("-lm",)), 42),
        (lambda recipe: replace(recipe, for_this_processor=True), 42),
    ],
    ids=["header", "source", "flags", "links", "processor"],
)
def test_what_changes_is_compiled_anew(
    recipe: Recipe, environment: dict[str, str], change: Callable[[Recipe], Recipe], answer: int
) -> None:
    before = build_library(recipe, environment=environment)
    changed = change(recipe)
    assert build_library(changed, environment=environment) != before
    assert load_library(changed, environment=environment).answer() == answer


def test_another_compiler_makes_another_library(recipe: Recipe, environment: dict[str, str], tmp_path: Path) -> None:
    noting, log = noting_compiler(tmp_path)
    before = build_library(recipe, environment=environment)
    assert build_library(recipe, environment=environment | noting) != before
    assert log.exists()


def test_what_a_compiler_made_serves_when_it_is_gone(recipe: Recipe, environment: dict[str, str]) -> None:
    made = build_library(recipe, environment=environment)
    assert build_library(recipe, environment=environment | {"PATH": "/nowhere"}) == made
    with pytest.raises(NativeUnavailable, match="no C compiler"):
        build_library(replace(recipe, flags=("-O2",)), environment=environment | {"PATH": "/nowhere"})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"PATH": "/nowhere", "CC": ""}, r"no C compiler found \(cc, gcc, clang\); install one, or name it by CC"),
        ({"CC": "no-such-compiler"}, "CC=no-such-compiler, which is not there"),
        ({"CC": "false"}, "failed"),
        ({"XDG_CACHE_HOME": "", "HOME": ""}, "no place to keep the library"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "cannot be had"),
    ],
)
def test_a_machine_that_cannot_compile_says_why(
    recipe: Recipe, environment: dict[str, str], changes: Mapping[str, str], error: str
) -> None:
    with pytest.raises(NativeUnavailable, match=error):
        build_library(recipe, environment=environment | changes)


def test_cpp_has_variables_and_compilers_of_its_own(environment: dict[str, str]) -> None:
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler found: CXX=none-such"):
        find_compiler(CPP, environment | {"CXX": "none-such"})
    with pytest.raises(NativeUnavailable, match="CC=none-such"):
        find_compiler(C, environment | {"CC": "none-such", "CXX": str(shutil.which("cc"))})


def test_what_the_compiler_refuses_is_told(recipe: Recipe, environment: dict[str, str]) -> None:
    recipe.source.write_text("int answer(void) { return nothing_of_that_name; }\n")
    with pytest.raises(NativeUnavailable, match="nothing_of_that_name"):
        build_library(recipe, environment=environment)


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    path.write_bytes(b"not a library")
    with pytest.raises(NativeUnavailable, match="cannot be loaded"):
        open_library(path)
