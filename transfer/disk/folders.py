"""The shared folder and the replicas' own folders in it: their names, and the end of those that died."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from transfer.disk.index import INDEX_NAME, NEW_INDEX_NAME

_FOLDER = re.compile(r"kv-[A-Za-z0-9_-]{1,100}-[0-9a-f]{16}")
_FILE = re.compile(rf"{INDEX_NAME}|{re.escape(NEW_INDEX_NAME)}|[0-9a-f]{{8}}\.pages")


def spool_name(replica_id: str, boot: int) -> str:
    """What the folder of this life of a replica is called."""
    return f"kv-{re.sub('[^A-Za-z0-9_-]', '_', replica_id)[-100:]}-{boot:016x}"


def is_spool_name(name: str) -> bool:
    """Whether a peer's folder can be called this; nothing that leads out of the shared folder is."""
    return _FOLDER.fullmatch(name) is not None


def check_shared(folder: Path | None) -> None:
    """Raises `ValueError` when it cannot be the shared folder."""
    if folder is None:
        raise ValueError("transport 'disk' needs a folder that all replicas can reach: set transfer.folder")
    if not folder.is_dir():
        raise ValueError(f"transfer.folder {str(folder)!r} is not a folder; make or mount it, on every node alike")


def remove_spool(path: Path) -> None:
    """Remove a replica's folder and what spools write in it, and nothing else. Raises `OSError` when that fails."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(path)):
            if _FILE.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
        os.rmdir(path)


def leftovers(folder: Path, *, own: str, silent_s: float) -> list[Path]:
    """Folders whose replicas showed no life for this long before `own` did last.

    Both times are the file system's, so the clocks of the hosts do not matter.
    """
    now = _last_life(folder / own)
    if now is None:
        return []
    found = [
        Path(entry.path)
        for entry in os.scandir(folder)
        if entry.name != own and is_spool_name(entry.name) and entry.is_dir(follow_symlinks=False)
    ]
    return [path for path in found if (life := _last_life(path)) is not None and now - life > silent_s]


def _last_life(path: Path) -> float | None:
    for witness in (path / INDEX_NAME, path):
        with contextlib.suppress(FileNotFoundError):
            return os.stat(witness, follow_symlinks=False).st_mtime
    return None
