"""A peer's folder as its reader sees it: which pages are there, and their bytes.

Nothing stays open between two calls, so there is nothing to close. Any number of threads may read at a time; the
index is looked at by one of them.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from transfer.disk.index import IndexReader, Place, Refusal, pack_name
from transfer.spans import runs


class Shelf:
    """The folder `path`, which need not exist (yet)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # guards the index
        self._index = IndexReader(path)

    def find(self, checksums: Sequence[int]) -> list[Place]:
        """Where these pages are, up to the first that is not there yet. Raises `OSError`."""
        with self._lock:
            if self._place(checksums[0]) is None:
                self._index.refresh()
            found: list[Place] = []
            for checksum in checksums:
                place = self._place(checksum)
                if place is None:
                    break
                found.append(place)
            return found

    def read(self, places: Sequence[Place], buffers: Sequence[memoryview]) -> bool:
        """Fill `buffers`, one per place and all of a page's size; False when a pack is gone. Raises `OSError`."""
        done = 0
        for pack, group in itertools.groupby(places, lambda place: place.pack):
            numbers = [place.place for place in group]
            try:
                fd = os.open(self._path / pack_name(pack), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                with self._lock:
                    self._index.forget(pack)
                return False
            try:
                for first, count in runs(numbers).tolist():
                    self._read_run(fd, first, buffers[done : done + count])
                    done += count
            finally:
                os.close(fd)
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

    def _read_run(self, fd: int, first: int, buffers: Sequence[memoryview]) -> None:
        size = buffers[0].nbytes
        found, expected = os.preadv(fd, buffers, first * size), size * len(buffers)
        if found != expected:
            raise OSError(f"a pack in {self._path} has {found} bytes where its index promises {expected}")

    def _place(self, checksum: int) -> Place | None:
        found = self._index.find(checksum)
        return found if isinstance(found, Place) else None
