"""A converted model folder: complete or absent, marked with what it was made from, written by one process at a time.

Needs neither torch nor gguf, so that asking whether a folder is there already costs nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_CONVERTER_VERSION = 1
_MARKER = "converted.json"


class FolderTaken(ValueError):
    """The target folder holds something that this converter did not write."""


def cache_folder() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/pd-serve`, below `~/.cache` where the variable is unset."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "pd-serve"


def is_converted(folder: Path, *, source: str, dtype: str = "bfloat16") -> bool:
    """Whether `folder` is a complete conversion of `source` by this version of the converter."""
    try:
        return bool(json.loads((folder / _MARKER).read_text()) == _marker(source, dtype))
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def replacing(target: Path, *, source: str, dtype: str) -> Iterator[Path]:
    """A temporary sibling that takes `target`'s place, marked, when the block ends well, and vanishes when not.

    Raises `FolderTaken` when `target` holds files without a marker: they are somebody's.
    """
    if target.exists() and any(target.iterdir()) and not (target / _MARKER).is_file():
        raise FolderTaken(f"{target} holds files that were not converted here; remove it or name another folder")
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        (temporary / _MARKER).write_text(json.dumps(_marker(source, dtype)) + "\n")
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(target: Path, *, timeout_s: float = 600.0) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of one that dies. Raises `TimeoutError`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.lock"
    deadline = time.monotonic() + timeout_s
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has held {path} for {timeout_s:.0f} s") from None
                time.sleep(0.1)
        yield


def _marker(source: str, dtype: str) -> dict[str, str | int]:
    return {"source": source, "dtype": dtype, "converter": _CONVERTER_VERSION}
