"""Compiles this folder's little C once per machine and keeps the result.

The library lies in the user's cache directory under a name made of everything it depends on, so a second start compiles
nothing and an upgrade never loads a stale one. It appears by rename: of processes that start together each may compile,
which takes a fraction of a second, and none sees half a library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-shared")
"""Nothing of one processor's own: a home directory may be shared between unequal machines. Arithmetic rounds after each
operation, so that every processor has the same results."""
_COMPILE_TIMEOUT_S = 60.0


class NativeUnavailable(RuntimeError):
    """There is no compiled code here, for the reason that the message gives."""


def load_library(name: str, *, environment: Mapping[str, str] = os.environ) -> ctypes.CDLL:
    """The library of <name>.c, compiled now if this machine has not done so yet. Raises `NativeUnavailable`."""
    source = Path(__file__).parent / f"{name}.c"
    target = _cache_directory(environment) / f"{name}-{_key(source)}.so"
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as work:
                library = Path(work, target.name)
                _compile(_find_compiler(environment), source, library)
                library.replace(target)
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NativeUnavailable(f"{target} cannot be had: {error}") from error


def _compile(compiler: str, source: Path, library: Path) -> None:
    command = [compiler, *_FLAGS, str(source), "-o", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"{compiler} did not run: {error}") from error
    if done.returncode != 0:
        raise NativeUnavailable(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")


def _find_compiler(environment: Mapping[str, str]) -> str:
    named = environment.get("CC")
    for name in (named,) if named else ("cc", "gcc", "clang"):
        found = shutil.which(name, path=environment.get("PATH", os.defpath))
        if found:
            return found
    raise NativeUnavailable(f"no C compiler found ({'CC=' + named if named else 'cc, gcc or clang'})")


def _cache_directory(environment: Mapping[str, str]) -> Path:
    root = environment.get("XDG_CACHE_HOME")
    if not root:
        home = environment.get("HOME")
        if not home:
            raise NativeUnavailable("neither XDG_CACHE_HOME nor HOME is set, so there is no place to keep the library")
        root = str(Path(home, ".cache"))
    return Path(root, "pd-serve")


def _key(source: Path) -> str:
    parts = (source.read_bytes(), *map(str.encode, (*_FLAGS, os.uname().sysname, os.uname().machine)))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
