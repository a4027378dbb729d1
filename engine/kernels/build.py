"""Compiles the C++ kernels once per machine and keeps the result.

The library lies in the user's cache directory under a name made of everything it depends on: sources, flags, compiler,
processor features and OpenMP runtime. So a second start compiles nothing, an upgrade never loads a stale library, and
home directories shared between unequal machines are safe. It appears by rename; of processes that start together, one
compiles.

The library is linked with the OpenMP runtime that torch has already loaded, so that torch's operations and these
kernels share one team of threads; two teams would double the threads and make each wait for the other's cores.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-w")
_COMPILE_TIMEOUT_S = 300.0
_TURN_POLL_S = 0.05
_OPENMP_LIBRARY = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*$")


class KernelBuildError(RuntimeError):
    """The C++ kernels cannot be had here: no compiler, no OpenMP runtime, or the compiler refused."""


def build_library(unit: str = "kernels", *, environment: Mapping[str, str] = os.environ) -> Path:
    """The library of csrc/<unit>.cpp, compiled now if this machine has not done so yet. Raises `KernelBuildError`."""
    compiler = _find_compiler(environment)
    openmp = loaded_openmp_runtime()
    target = _cache_directory(environment) / f"{unit}-{_key(compiler, openmp)}.so"
    if target.exists():
        return target
    started = time.monotonic()
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _turn(target.parent):
            if target.exists():
                return target
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as work:
                compiled, library = Path(work, f"{unit}.o"), Path(work, f"{unit}.so")
                _run(compiler, *_FLAGS, "-c", str(SOURCES / f"{unit}.cpp"), "-o", str(compiled))
                _run(compiler, "-shared", str(compiled), str(openmp), "-o", str(library))
                library.replace(target)
    except OSError as error:
        raise KernelBuildError(f"the kernel cache {target.parent} cannot be written: {error}") from error
    logger.info("compiled %s.cpp in %.1f s into %s", unit, time.monotonic() - started, target)
    return target


@contextlib.contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """Let one process compile into `directory` while others wait for its library, at most as long as one may take.

    A lock that cannot be had is gone without: compiling twice costs time and nothing else.
    """
    give_up_at = time.monotonic() + _COMPILE_TIMEOUT_S
    lock = os.open(directory, os.O_RDONLY)  # the directory itself, so that no file is left
    try:
        while time.monotonic() < give_up_at:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_TURN_POLL_S)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(lock)  # and with it the lock, as when this process dies


def loaded_openmp_runtime() -> Path:
    """The OpenMP library that torch brought into this process. Raises `KernelBuildError` when there is none."""
    site = Path(torch.__file__).parents[1]
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as maps:
        loaded = {Path(path) for path in _paths(maps) if _OPENMP_LIBRARY.search(path)}
        if loaded:
            # Other packages may have brought runtimes of their own; torch's lies in its wheel or is the system's.
            return min(loaded, key=lambda path: (site / "torch" not in path.parents, site in path.parents, path))
    bundled = sorted(site.glob("torch/lib/libgomp*"))
    if bundled:
        return bundled[0]
    raise KernelBuildError("torch has loaded no OpenMP runtime in this process, so kernels cannot share its threads")


def _paths(maps: Iterable[str]) -> Iterable[str]:
    for line in maps:
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            yield fields[5].rstrip("\n")


def _find_compiler(environment: Mapping[str, str]) -> str:
    named = environment.get("CXX")
    for name in (named,) if named else ("g++", "clang++", "c++"):
        found = shutil.which(name, path=environment.get("PATH", os.defpath))
        if found:
            return found
    raise KernelBuildError(f"no C++ compiler found ({'CXX=' + named if named else 'g++, clang++ or c++'})")


def _cache_directory(environment: Mapping[str, str]) -> Path:
    root = environment.get("XDG_CACHE_HOME")
    if not root:
        home = environment.get("HOME")
        if not home:
            raise KernelBuildError("neither XDG_CACHE_HOME nor HOME is set, so there is no place to keep the kernels")
        root = str(Path(home, ".cache"))
    return Path(root, "pd-serve")


def _key(compiler: str, openmp: Path) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    for part in (*_FLAGS, _run(compiler, "--version"), str(openmp), _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:24]


def _processor() -> str:
    """The first processor's feature line, or the machine's name where there is no such file."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.lower().startswith(("flags", "features")):
                return line
    return os.uname().machine


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        raise KernelBuildError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
