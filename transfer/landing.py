"""Our side of a copy: the pages that bytes land in, their verification, and the fault seam around both."""

from __future__ import annotations

import hmac

import numpy as np
import numpy.typing as npt
import xxhash

from transfer.checksum import page_checksums
from transfer.faults import Faults
from transfer.grains import Bytes, PoolGrains
from transfer.jobs import PageCopy
from transfer.wire_grains import SEAL_BYTES, seal


class LandingError(Exception):
    """What landed is not what was promised."""


class CopyStopped(Exception):
    """The copy was asked to stop and did."""


class Landing:
    """The fetcher's own pool as its transports see it: `bytes` uint8 [pool bytes], `view` the same as a memoryview, and
    `fd` the memory's, if helper processes of ours may write into it, else None."""

    def __init__(self, view: memoryview, *, page_bytes: int, faults: Faults | None, fd: int | None = None) -> None:
        self.view = view
        self.fd = fd
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(view, dtype=np.uint8)
        self.page_bytes = page_bytes
        self._faults = faults

    def before(self, copy: PageCopy, transport: str) -> None:
        """To be called before each piece is written; raises `InjectedFault` when a test says so."""
        if self._faults is not None:
            self._faults.before_copy(copy.site(transport))

    def landed(self, copy: PageCopy, transport: str, count: int) -> None:
        """The next `count` pages of `copy` were written: verify and count them. Raises `LandingError`."""
        first = copy.done_pages
        pages = copy.job.target_pages[first : first + count]
        if self._faults is not None:
            for page in pages:
                start = page * self.page_bytes
                self._faults.after_copy(copy.site(transport), self.view[start : start + self.page_bytes])
        expected = copy.job.checksums[first : first + count]
        if any(expected):
            for index, found in enumerate(page_checksums(self.view, self.page_bytes, pages)):
                if found != expected[index] and expected[index]:
                    raise LandingError(
                        f"page {copy.job.source_pages[first + index]} arrived with checksum {found:#018x} "
                        f"instead of {expected[index]:#018x}"
                    )
        copy.done_pages = first + count

    def packed(self, copy: PageCopy, transport: str, grains: Bytes) -> None:
        """The next grains of `copy` lie in `grains`, one behind the other: verify them, put them in their places and
        count them. Raises `LandingError`, with nothing of them in our pages."""
        assert copy.peer.cut is not None
        first, size = copy.done_pages, copy.page_bytes
        count = grains.nbytes // size
        for index in range(count):
            grain = grains[index * size : (index + 1) * size].data
            if self._faults is not None:
                self._faults.after_copy(copy.site(transport), grain)
            expected = copy.job.checksums[first + index] if copy.job.checksums else 0
            if expected and (found := xxhash.xxh3_64_intdigest(grain)) != expected:
                raise LandingError(
                    f"grain {copy.job.source_pages[first + index]} arrived with checksum {found:#018x} "
                    f"instead of {expected:#018x}"
                )
        targets = copy.job.target_pages[first : first + count]
        PoolGrains(self.bytes, copy.peer.cut.target).scatter(targets, grains)
        copy.done_pages = first + count

    def coded(self, copy: PageCopy, transport: str, grains: Bytes, *, key: bytes, job: int) -> None:
        """The next grains of `copy` lie in `grains` `[grains, bytes]` in 8 bits, each with its seal behind it, as the
        reply to request `job`: verify them, put them in their places and count them. Raises `LandingError`, with
        nothing of the first wrong one or any after it in our pages."""
        assert copy.peer.coded is not None
        grid, codec = copy.peer.coded.cut.target, copy.peer.coded.codec
        pool, stored = PoolGrains(self.bytes, grid), np.empty(grid.grain_bytes, dtype=np.uint8)
        for row in grains:
            if self._faults is not None:
                self._faults.after_copy(copy.site(transport), row.data)
            index, coded = copy.done_pages, row[:-SEAL_BYTES]
            if not hmac.compare_digest(row[-SEAL_BYTES:].tobytes(), seal(key, job=job, index=index, coded=coded.data)):
                raise LandingError(f"grain {copy.job.source_pages[index]} arrived with a wrong seal")
            codec.decode(grid, coded, stored)
            pool.scatter((copy.job.target_pages[index],), stored)
            copy.done_pages += 1

    def close(self) -> None:
        """Let go of the memory."""
        del self.bytes
