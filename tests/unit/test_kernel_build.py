"""Compiling the kernels: once, safely against a race, into torch's own threads, and what happens where it cannot be."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from engine.kernels import select
from engine.kernels.build import KernelBuildError, build_library, loaded_openmp_runtime
from engine.kernels.library import Library
from engine.kernels.native import NativeKernels
from engine.kernels.select import open_cpu_kernels, open_kernels

REPOSITORY = Path(__file__).resolve().parents[2]


def counting_compiler(folder: Path) -> tuple[dict[str, str], Path]:
    """An environment whose compiler notes each compilation in a file before it runs the real one."""
    real = shutil.which("g++") or shutil.which("c++")
    if real is None:
        pytest.skip("no C++ compiler here")
    log, script = folder / "compilations", folder / "compiler"
    script.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo x >> {log};; esac\nexec {real} "$@"\n')
    script.chmod(0o755)
    return os.environ | {"CXX": str(script), "XDG_CACHE_HOME": str(folder / "cache")}, log


def test_compiles_once_for_one_machine(tmp_path: Path) -> None:
    environment, log = counting_compiler(tmp_path)
    first = build_library("sampling", environment=environment)
    assert build_library("sampling", environment=environment) == first
    assert log.read_text().count("x") == 1
    assert list(first.parent.iterdir()) == [first]  # nothing of the build is left behind


def test_processes_may_race(tmp_path: Path) -> None:
    environment, log = counting_compiler(tmp_path)
    program = "from engine.kernels.build import build_library; print(build_library('sampling'))"
    racers = [
        subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    paths = {racer.communicate(timeout=120)[0].decode().strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert log.read_text().count("x") == 1, "the other one waited for the library"
    (path,) = paths
    assert [entry.name for entry in Path(path).parent.iterdir()] == [Path(path).name]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": "/nonexistent", "HOME": "/tmp"}, "no C"),
        ({"CXX": "no-such-compiler", "PATH": os.environ["PATH"], "HOME": "/tmp"}, "CXX=no-such-compiler"),
        ({"CXX": "false", "PATH": os.environ["PATH"], "HOME": "/tmp"}, "failed"),
        ({"PATH": os.environ["PATH"]}, "XDG_CACHE_HOME"),
    ],
)
def test_says_why_there_are_no_kernels(environment: Mapping[str, str], message: str) -> None:
    with pytest.raises(KernelBuildError, match=message):
        build_library(environment=environment)


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(KernelBuildError, match="file"):
        build_library(environment=os.environ | {"XDG_CACHE_HOME": str(blocked)})


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    path.write_bytes(b"not a library")
    with pytest.raises(KernelBuildError, match="cannot be loaded"):
        Library(path)


def test_without_a_compiler_numba_takes_over(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, logger=select.__name__):
        kernels = open_cpu_kernels(num_threads=1)
    assert kernels.name == "numba"
    assert "no-such-compiler" in caplog.text


def test_shares_torchs_threads() -> None:
    """One OpenMP runtime in the process, torch's, after the kernels are loaded."""
    NativeKernels(num_threads=1)
    ours = loaded_openmp_runtime()
    assert "torch" in str(ours)
    linked = subprocess.run(["readelf", "-d", str(build_library())], capture_output=True, text=True, check=True).stdout
    needed = [line for line in linked.splitlines() if "NEEDED" in line and "omp" in line]
    assert len(needed) == 1
    assert ours.name in needed[0]


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'mps'.*'cpu'.*'cuda'"):
        open_kernels("mps", num_threads=1)
    with pytest.raises(ImportError, match=r"pd-serve\[gpu\]"):
        open_kernels("cuda", num_threads=1)
