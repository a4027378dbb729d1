"""The index of a spool: an append-only file of small records that says where each page is, or why it never will be.

A header of 16 bytes (magic, generation) is followed by records of 16: checksum, pack, place in the pack. A later
record of the same checksum replaces an earlier one. Pack 0 is none: the place is then a `Refusal`. When most records
are out of date the file is replaced by one of the next generation, which readers notice and begin anew. A reader that
sees half a record leaves it for the next look; whatever else it might misread is caught by the pages' checksums.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

INDEX_NAME = "index"
NEW_INDEX_NAME = "index.new"

_MAGIC = b"pd-kv-1\n"
_HEADER = struct.Struct("<8sQ")
_RECORD = struct.Struct("<QII")
_READ_BYTES = _RECORD.size << 12
_WRITE_FLAGS = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW


class Refusal(enum.IntEnum):
    """Why a page that was offered is not in the spool."""

    REUSED = 1
    BUSY = 2
    FULL = 3
    FAILED = 4

    @property
    def words(self) -> str:
        return _WORDS[self]


_WORDS = {
    Refusal.REUSED: "its memory was in use for something else before it was written",
    Refusal.BUSY: "more pages were waiting to be written than the spool accepts",
    Refusal.FULL: "the disk is full",
    Refusal.FAILED: "writing to the folder failed; the log of its replica says why",
}


class Place(NamedTuple):
    """Page number `place` of pack number `pack`."""

    pack: int
    place: int


def pack_name(pack: int) -> str:
    return f"{pack:08x}.pages"


def write_all(fd: int, content: memoryview) -> None:
    """A full disk writes less than it was asked to before it says why."""
    while content:
        content = content[os.write(fd, content) :]


class IndexWriter:
    """The owner's side. Used by one thread. Every method may raise `OSError`; the next `replace` mends what it left."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / INDEX_NAME
        self._new = folder / NEW_INDEX_NAME
        self._generation = 0
        self.num_records = 0
        """In the file, out of date or not."""

    def replace(self, places: Iterable[tuple[int, Place]]) -> None:
        """Begin the next generation with these pages, each `(checksum, place)`."""
        records = [_RECORD.pack(checksum, *place) for checksum, place in places]
        self._generation += 1
        header = _HEADER.pack(_MAGIC, self._generation)
        self._write(self._new, os.O_CREAT | os.O_TRUNC, header + b"".join(records))
        os.rename(self._new, self._path)
        self.num_records = len(records)

    def append(self, places: Iterable[tuple[int, Place]], refusals: Iterable[tuple[int, Refusal]]) -> None:
        """Publish places and refusals, each with its checksum."""
        records = [_RECORD.pack(checksum, *place) for checksum, place in places]
        records += [_RECORD.pack(checksum, 0, refusal) for checksum, refusal in refusals]
        if records:
            self._write(self._path, os.O_APPEND, b"".join(records))
            self.num_records += len(records)

    def exists(self) -> bool:
        """Whether nobody has removed it."""
        return self._path.exists()

    def touch(self) -> None:
        """Show that the owner lives; by the file system's own clock, which all replicas share."""
        os.utime(self._path)

    @staticmethod
    def _write(path: Path, flags: int, content: bytes) -> None:
        fd = os.open(path, _WRITE_FLAGS | flags, 0o600)
        try:
            write_all(fd, memoryview(content))
        finally:
            os.close(fd)


class IndexReader:
    """A peer's index as far as it was read. To be used by one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / INDEX_NAME
        self._generation = 0
        self._offset = 0
        self._places: dict[int, Place] = {}

    def refusal(self, checksum: int) -> Refusal | None:
        """Why the page is not there, when the index says so."""
        found = self._places.get(checksum)
        return None if found is None or found.pack else Refusal(found.place)

    def find(self, checksums: Sequence[int]) -> list[Place]:
        """Where these pages are, up to the first that is not there (yet)."""
        found: list[Place] = []
        for checksum in checksums:
            place = self._places.get(checksum)
            if place is None or not place[0]:
                break
            found.append(place)
        return found

    def forget(self, pack: int) -> None:
        """The pack is not there any more; its pages may come in another one."""
        self._places = {checksum: place for checksum, place in self._places.items() if place.pack != pack}

    def refresh(self) -> None:
        """Read what was added since. A file that is not there has nothing; one that is no index raises `OSError`."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        try:
            self._read(fd)
        finally:
            os.close(fd)

    def _read(self, fd: int) -> None:
        header = os.pread(fd, _HEADER.size, 0)
        magic, generation = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0)
        if magic != _MAGIC:
            raise OSError(f"{self._path} is no index of KV pages")
        if generation != self._generation:
            self._places.clear()
            self._generation, self._offset = generation, _HEADER.size
        while content := os.pread(fd, _READ_BYTES, self._offset):
            whole = len(content) - len(content) % _RECORD.size
            for checksum, pack, place in _RECORD.iter_unpack(content[:whole]):
                if pack == 0 and place not in _WORDS:
                    raise OSError(f"{self._path} has a record of an unknown kind, {place}")
                self._places[checksum] = Place(pack, place)
            self._offset += whole
            if len(content) < _READ_BYTES:
                return
