"""A spool's own folder: packs of pages, the index that names them, and what has to go when there is too much.

Used by the spool's one thread. The folder is made at once and removed by `remove`. Every method may raise `OSError`;
the folder is then as useful as before, and what the index lost is put right with the next call.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transfer.disk.folders import remove_spool
from transfer.disk.index import IndexWriter, Place, Refusal, pack_name, write_all

logger = logging.getLogger(__name__)

_SLACK_RECORDS = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class SpoolLimits:
    """What a spool may hold."""

    max_bytes: int = 4 << 30
    max_age_s: float = 600.0
    max_waiting_bytes: int = 1 << 30
    """Of pages that are offered and not written yet."""
    leftover_s: float = 600.0
    """Another replica's folder without a sign of life for this long is removed; living ones give four in that time."""


@dataclass(frozen=True, kw_only=True)
class _Pack:
    checksums: Sequence[int]
    nbytes: int
    ends_at: int
    """Bytes that were written before and with it, ever."""
    written_at: float


class PackStore:
    """The packs in `path`, a folder that must not exist yet."""

    def __init__(self, path: Path, *, limits: SpoolLimits, clock: Callable[[], float]) -> None:
        self._path = path
        self._limits = limits
        self._clock = clock
        self._packs: dict[int, _Pack] = {}  # oldest first
        self._places: dict[int, Place] = {}
        self._held_bytes = self._written_bytes = self._last_pack = 0
        path.mkdir(mode=0o700)
        self._index = IndexWriter(path)
        self._index.replace(())
        self._index_is_sound = True

    def notice_removal(self) -> None:
        """Begin anew when somebody removed the files: pages that are believed to be here would not be written again."""
        if not self._index.exists():
            self._begin_anew()

    def is_fresh(self, checksum: int) -> bool:
        """Whether the page is here, and far enough from eviction to be taken once more."""
        place = self._places.get(checksum)
        if place is None:
            return False
        pack, limits = self._packs[place.pack], self._limits
        recent = self._clock() - pack.written_at < limits.max_age_s / 2
        return recent and self._written_bytes - pack.ends_at < limits.max_bytes / 2

    def add(self, pages: memoryview, checksums: Sequence[int], refusals: Sequence[tuple[int, Refusal]]) -> None:
        """Put `pages`, one for each checksum, into a new pack and publish it, and the refusals."""
        places: list[tuple[int, Place]] = []
        refused = list(refusals)
        if checksums:
            try:
                places = self._add_pack_somehow(pages, checksums)
            except OSError as error:
                logger.warning("%d pages could not be written to %s: %s", len(checksums), self._path, error)
                why = Refusal.FULL if error.errno in _FULL else Refusal.FAILED
                refused += [(checksum, why) for checksum in checksums]
        if self._index.num_records > 2 * len(self._places) + _SLACK_RECORDS:
            self._index_is_sound = False
        if not self._index_is_sound:
            self._mend_index()
            places = []  # published by now
        self._index_is_sound = False
        self._index.append(places, refused)
        self._index_is_sound = True

    def tidy(self) -> None:
        """Show life, and remove what is too old."""
        if not self._index_is_sound:
            self._mend_index()
        self._index.touch()
        self._evict(self._limits.max_bytes)

    def remove(self) -> None:
        """Remove the folder."""
        remove_spool(self._path)

    # ---- inner workings -----------------------------------------------------------------------------------

    def _add_pack_somehow(self, pages: memoryview, checksums: Sequence[int]) -> list[tuple[int, Place]]:
        """At the second attempt, where something can be done about what went wrong with the first."""
        try:
            return self._add_pack(pages, checksums)
        except OSError as error:
            if not self._make_good(error):
                raise
        return self._add_pack(pages, checksums)

    def _add_pack(self, pages: memoryview, checksums: Sequence[int]) -> list[tuple[int, Place]]:
        self._evict(self._limits.max_bytes - pages.nbytes)
        self._last_pack += 1
        number = self._last_pack
        self._write_pack(self._path / pack_name(number), pages)
        self._held_bytes += pages.nbytes
        self._written_bytes += pages.nbytes
        self._packs[number] = _Pack(
            checksums=checksums, nbytes=pages.nbytes, ends_at=self._written_bytes, written_at=self._clock()
        )
        places = [(checksum, Place(number, place)) for place, checksum in enumerate(checksums)]
        self._places.update(places)
        return places

    @staticmethod
    def _write_pack(path: Path, pages: memoryview) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                write_all(fd, pages)
            finally:
                os.close(fd)
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def _evict(self, max_bytes: int) -> None:
        """Remove the oldest packs, until those left are no larger than this and none is too old."""
        oldest = self._clock() - self._limits.max_age_s
        while self._packs:
            number, pack = next(iter(self._packs.items()))
            if self._held_bytes <= max_bytes and pack.written_at >= oldest:
                return
            (self._path / pack_name(number)).unlink(missing_ok=True)
            del self._packs[number]
            self._held_bytes -= pack.nbytes
            for checksum in pack.checksums:
                if self._places[checksum].pack == number:
                    del self._places[checksum]

    def _make_good(self, error: OSError) -> bool:
        """Make room on a full disk; begin anew when somebody removed our folder. False when neither was called for."""
        if error.errno in _FULL:
            held = self._held_bytes
            self._evict(held // 2)
            return self._held_bytes < held
        if self._path.exists():
            return False
        self._begin_anew()
        return True

    def _begin_anew(self) -> None:
        self._path.mkdir(mode=0o700, exist_ok=True)
        self._packs.clear()
        self._places.clear()
        self._held_bytes = 0
        self._index_is_sound = False

    def _mend_index(self) -> None:
        self._index.replace(self._places.items())
        self._index_is_sound = True
