"""Compiles a C or C++ source once per machine and keeps the library.

Libraries lie in the user's cache directory, under names made of all that they depend on: source and headers, flags,
what is linked, the machine, the compiler. So a second start compiles nothing, an upgrade never loads a stale one, and
home directories may be shared between unequal machines. A library appears by rename; of processes that start together
one compiles, and the others wait for it. Where there is no compiler (any more), what one has made of the same serves.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from native.compiler import COMPILE_TIMEOUT_S, Compiler, Language, NativeUnavailable, find_compiler

logger = logging.getLogger(__name__)

_TURN_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a library is made."""

    source: Path
    """Headers that it includes lie beside it."""
    language: Language
    flags: tuple[str, ...]
    links: tuple[str, ...] = ()
    """What it is linked with."""
    for_this_processor: bool = False
    """Whether it may use instructions that others have not."""

    @property
    def compile_flags(self) -> tuple[str, ...]:
        tuned = ("-march=native",) if self.for_this_processor else ()
        return (*self.flags, *tuned, "-fPIC", "-fvisibility=hidden")

    def digest(self) -> str:
        """Of all but the compiler."""
        digest = hashlib.sha256()
        for path in (self.source, *sorted(self.source.parent.glob("*.h"))):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        machine = (os.uname().sysname, os.uname().machine, _processor() if self.for_this_processor else "")
        for part in (*self.compile_flags, *self.links, *machine):
            digest.update(part.encode() + b"\0")
        return digest.hexdigest()[:24]


def load_library(recipe: Recipe, *, environment: Mapping[str, str] = os.environ) -> ctypes.CDLL:
    """Its library in this process, compiled now if this machine has not done so yet. Raises `NativeUnavailable`."""
    return open_library(build_library(recipe, environment=environment))


def open_library(path: Path) -> ctypes.CDLL:
    """Raises `NativeUnavailable` for what is no library."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"{path} cannot be loaded: {error}") from error


def build_library(recipe: Recipe, *, environment: Mapping[str, str] = os.environ) -> Path:
    """Where its library lies, compiled now if this machine has not done so yet. Raises `NativeUnavailable`."""
    compiler = find_compiler(recipe.language, environment)
    folder = _cache_directory(environment) / recipe.source.stem
    digest = recipe.digest()
    if compiler is None:
        return _by_any_compiler(folder, digest, recipe.language)
    target = folder / f"{digest}-{hashlib.sha256(compiler.identity.encode()).hexdigest()[:8]}.so"
    try:
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _turn(folder):
                if not target.exists():
                    _make(recipe, compiler, target)
    except OSError as error:
        raise NativeUnavailable(f"{target} cannot be had: {error}") from error
    return target


def _by_any_compiler(folder: Path, digest: str, language: Language) -> Path:
    made = sorted(folder.glob(f"{digest}-*.so"))
    if not made:
        raise NativeUnavailable(
            f"no {language.name} compiler found ({', '.join(language.compilers)}); install one, or name it by "
            f"{language.variable}"
        )
    return made[0]


def _make(recipe: Recipe, compiler: Compiler, target: Path) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as work:
        compiled, library = Path(work, "compiled.o"), Path(work, "library.so")
        compiler.run(*recipe.compile_flags, "-c", str(recipe.source), "-o", str(compiled))
        compiler.run("-shared", str(compiled), *recipe.links, "-o", str(library))
        library.replace(target)
    logger.info("compiled %s in %.1f s into %s", recipe.source.name, time.monotonic() - started, target)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Let one process compile into `folder` while others wait for its library, at most as long as that may take.

    A lock that cannot be had is gone without: compiling twice costs time and nothing else.
    """
    give_up_at = time.monotonic() + COMPILE_TIMEOUT_S
    lock = os.open(folder, os.O_RDONLY)  # the folder itself, so that no file is left
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


def _cache_directory(environment: Mapping[str, str]) -> Path:
    root = environment.get("XDG_CACHE_HOME")
    if not root:
        home = environment.get("HOME")
        if not home:
            raise NativeUnavailable("neither XDG_CACHE_HOME nor HOME is set, so there is no place to keep the library")
        root = str(Path(home, ".cache"))
    return Path(root, "pd-serve", "native")


def _processor() -> str:
    """The first processor's feature line; the machine's name says enough where there is no such file."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.lower().startswith(("flags", "features")):
                return line
    return ""
