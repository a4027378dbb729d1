"""A peer's folder as its reader sees it: which pages are there, and their bytes.

Packs are open in an `OpenPacks`, and only there, for as long as one copy is read. Any number of threads may read at a
time; the index is looked at by one of them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from transfer.disk.index import IndexReader, Place, Refusal, pack_name
from transfer.span_copy import Bytes, Numbers
from transfer.span_io import read_spans

_MAX_OPEN = 64


class Shelf:
    """The folder `path`, which need not exist (yet)."""

    def __init__(self, path: Path) -> None:
        self.is_doubtful = False
        """Its reader's to say: whether the last page that was waited for did not come, and nothing has since."""
        self._path = path
        self._lock = threading.Lock()  # guards the index
        self._index = IndexReader(path)

    def find(self, checksums: Sequence[int]) -> list[Place]:
        """Where these pages are, up to the first that is not there yet. Raises `OSError`."""
        with self._lock:
            found = self._index.find(checksums)
            if not found:
                self._index.refresh()
                found = self._index.find(checksums)
            return found

    @contextlib.contextmanager
    def opened(self) -> Iterator[OpenPacks]:
        """To read from; it ends with the context."""
        packs = OpenPacks(self._path)
        try:
            yield packs
        finally:
            packs.close()

    def forget(self, pack: int) -> None:
        """Its file is gone, and with it all that the index says of it."""
        with self._lock:
            self._index.forget(pack)

    def refusal(self, checksum: int) -> Refusal | None:
        """Why the page was not written, when the index says so."""
        with self._lock:
            return self._index.refusal(checksum)

    def state(self) -> str:
        """Of the folder, for people who look for what is wrong."""
        if self._path.is_dir():
            return f"{self._path} is there, without it"
        return f"{self._path} is not there: do both replicas have the same folder, and the same user?"


class PackGone(Exception):
    """The file of `pack` was removed."""

    def __init__(self, pack: int) -> None:
        super().__init__(f"pack {pack} is gone")
        self.pack = pack


class OpenPacks:
    """Files of packs, opened when they are first read and kept for the next pages: those of a prompt may lie in any
    order. At most `_MAX_OPEN` at a time; `close` closes them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fds: dict[int, int] = {}  # the one that was used last at the end

    def read(self, places: Sequence[Place], memory: Bytes, targets: Numbers, size: int) -> None:
        """Read the pages of `size` bytes at `places` to `targets`, bytes of `memory`. Raises `PackGone` and
        `OSError`."""
        for start in range(0, len(places), _MAX_OPEN):
            some = places[start : start + _MAX_OPEN]
            opened = {pack: self._fd(pack) for pack in {pack for pack, _ in some}}
            fds, offsets = [opened[pack] for pack, _ in some], [place * size for _, place in some]
            done = read_spans(fds, offsets, memory, targets[start : start + _MAX_OPEN], size)
            if done < len(fds):
                found, promised = os.fstat(fds[done]).st_size, offsets[done] + size
                raise OSError(f"a pack in {self._path} has {found} bytes where its index promises {promised}")

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _fd(self, pack: int) -> int:
        fd = self._fds.pop(pack, None)
        if fd is None:
            if len(self._fds) >= _MAX_OPEN:
                os.close(self._fds.pop(next(iter(self._fds))))
            try:
                fd = os.open(self._path / pack_name(pack), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                raise PackGone(pack) from None
        self._fds[pack] = fd
        return fd
