"""A peer's folder as its reader sees it: which pages are there, and their bytes.

Nothing stays open between two calls, so there is nothing to close. Any number of threads may read at a time; the
index is looked at by one of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transfer.disk.index import IndexReader, Place, Refusal, pack_name


class Run(NamedTuple):
    """`length` pages that lie one after the other in a pack."""

    pack: int
    place: int
    length: int


class Shelf:
    """The folder `path`, which need not exist (yet)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # guards the index
        self._index = IndexReader(path)

    def find(self, checksums: Sequence[int]) -> Run | None:
        """Where the first of these pages is, and as many of the following as lie behind it; None when it is not there
        yet. Raises `OSError`."""
        with self._lock:
            first = self._place(checksums[0])
            if first is None:
                self._index.refresh()
                first = self._place(checksums[0])
            if first is None:
                return None
            length = 1
            while length < len(checksums) and self._place(checksums[length]) == (first.pack, first.place + length):
                length += 1
        return Run(first.pack, first.place, length)

    def read(self, run: Run, buffers: Sequence[memoryview], *, page_bytes: int) -> bool:
        """Fill `buffers`, one per page of `run`; False when the pack is gone. Raises `OSError`."""
        try:
            fd = os.open(self._path / pack_name(run.pack), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            with self._lock:
                self._index.forget(run.pack)
            return False
        try:
            found = os.preadv(fd, buffers, run.place * page_bytes)
        finally:
            os.close(fd)
        if found != run.length * page_bytes:
            raise OSError(f"{pack_name(run.pack)} has {found} bytes where its index promises {run.length * page_bytes}")
        return True

    def refusal(self, checksum: int) -> Refusal | None:
        """Why the page was not written, when the index says so."""
        with self._lock:
            found = self._index.find(checksum)
        return found if isinstance(found, Refusal) else None

    def state(self) -> str:
        """Of the folder, for people who look for what is wrong."""
        if self._path.is_dir():
            return f"{self._path} is there, without it"
        return f"{self._path} is not there: do both replicas have the same folder, and the same user?"

    def _place(self, checksum: int) -> Place | None:
        found = self._index.find(checksum)
        return found if isinstance(found, Place) else None
