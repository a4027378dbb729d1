"""The C and C++ compilers of this machine: found by name, and run with a time limit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

COMPILE_TIMEOUT_S = 300.0
"""For one run of a compiler, also on a small machine with other work."""


class NativeUnavailable(RuntimeError):
    """There is no compiled code here, for the reason that the message gives."""


@dataclass(frozen=True)
class Language:
    """What a source is written in, and how its compiler is found."""

    name: str
    variable: str
    """Of the environment, which names a compiler of the user's own."""
    compilers: tuple[str, ...]
    """Those that will do, the first before the others."""


C = Language("C", "CC", ("cc", "gcc", "clang"))
CPP = Language("C++", "CXX", ("g++", "clang++", "c++"))


@dataclass(frozen=True)
class Compiler:
    path: str

    @property
    def identity(self) -> str:
        """Changes with the compiler. Told without running it, which would cost every start a few milliseconds."""
        program = Path(self.path).resolve()
        status = program.stat()
        return f"{program} {status.st_size} {status.st_mtime_ns}"

    def run(self, *arguments: str) -> None:
        """Raises `NativeUnavailable` with what it complains of."""
        command = [self.path, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NativeUnavailable(f"{self.path} did not run: {error}") from error
        if done.returncode != 0:
            raise NativeUnavailable(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")


def find_compiler(language: Language, environment: Mapping[str, str]) -> Compiler | None:
    """None where there is none. Raises `NativeUnavailable` when the environment names one that is not there."""
    named = environment.get(language.variable)
    for name in (named,) if named else language.compilers:
        found = shutil.which(name, path=environment.get("PATH", os.defpath))
        if found:
            return Compiler(found)
    if named:
        raise NativeUnavailable(
            f"no {language.name} compiler found: {language.variable}={named}, which is not there; "
            f"name one that is, or unset {language.variable}"
        )
    return None
