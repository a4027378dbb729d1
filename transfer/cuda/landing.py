"""Our side of a copy where the pool is in GPU memory: what `transfer/landing.py` is for pools of the host."""

from __future__ import annotations

from transfer.checksum import page_checksums
from transfer.cuda.memory import DeviceMemory
from transfer.faults import Faults
from transfer.jobs import PageCopy
from transfer.landing import LandingError


class DeviceLanding:
    """The fetcher's own pool as `CudaTransport` sees it."""

    def __init__(self, memory: DeviceMemory, *, page_bytes: int, faults: Faults | None) -> None:
        self.memory = memory
        self.page_bytes = page_bytes
        self._faults = faults

    def before(self, copy: PageCopy, transport: str) -> None:
        """To be called before each piece is written; raises `InjectedFault` when a test says so."""
        if self._faults is not None:
            self._faults.before_copy(copy.site(transport))

    def landed(self, copy: PageCopy, transport: str, count: int, seen: memoryview | None) -> None:
        """The next `count` pages of `copy` were written; `seen` is a copy of them, read back, or None where nothing is
        to be verified. Verify and count them. Raises `LandingError`."""
        first, size = copy.done_pages, self.page_bytes
        if seen is not None:
            if self._faults is not None:
                for index in range(count):
                    self._faults.after_copy(copy.site(transport), seen[index * size : (index + 1) * size])
            expected = copy.job.checksums[first : first + count]
            for index, found in enumerate(page_checksums(seen, size, range(count))):
                if expected[index] not in (0, found):
                    raise LandingError(
                        f"page {copy.job.source_pages[first + index]} arrived with checksum {found:#018x} "
                        f"instead of {expected[index]:#018x}"
                    )
        copy.done_pages = first + count

    def close(self) -> None:
        """Nothing to let go of: the memory is its owner's."""
