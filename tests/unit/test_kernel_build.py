"""The compiled kernels: in torch's own threads, and what takes over where they cannot be had."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import pytest

from engine.kernels import select
from engine.kernels.build import build_kernels, loaded_openmp_runtime
from engine.kernels.library import Library
from engine.kernels.native import NativeKernels
from engine.kernels.select import open_cpu_kernels, open_kernels
from native.compiler import NativeUnavailable


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    path.write_bytes(b"not a library")
    with pytest.raises(NativeUnavailable, match="cannot be loaded"):
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
    linked = subprocess.run(["readelf", "-d", str(build_kernels())], capture_output=True, text=True, check=True).stdout
    needed = [line for line in linked.splitlines() if "NEEDED" in line and "omp" in line]
    assert len(needed) == 1
    assert ours.name in needed[0]


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'mps'.*'cpu'.*'cuda'"):
        open_kernels("mps", num_threads=1)
    with pytest.raises(ImportError, match=r"pd-serve\[gpu\]"):
        open_kernels("cuda", num_threads=1)
