"""The transfer layer as the worst it may be: every copy is done, or fails, exactly when the schedule says so.

It honours what `PageFetcher` promises and nothing more: bytes may land at any moment between `fetch` and the result,
also after `cancel`; the result comes once, after the last byte; it is good only if every checksum was right.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.kv_spec import KVPool
from protocol.rooms import PeerAddress
from transfer.jobs import FetchJob, FetchResult

Key = tuple[object, int]


def pool_checksums(pool: KVPool, pages: Sequence[int]) -> list[int]:
    """One checksum per page, never 0."""
    return [zlib.crc32(pool.data[page].numpy().tobytes()) | 1 << 32 for page in pages]


@dataclass
class Copy:
    """One job on its way."""

    job: FetchJob
    copied: bool = False
    stopped: bool = False
    """Cancelled, or its peer is fenced: it may end without having copied."""
    cancelled: bool = False


class Copies:
    """The fetcher of one replica. `pools` finds the memory of a peer, which outlives the peer as a mapping does."""

    def __init__(self, pool: KVPool, pools: Callable[[PeerAddress], KVPool], reaches: Callable[[PeerAddress], bool]):
        self.running: dict[Key, Copy] = {}
        self._pool = pool
        self._pools = pools
        self._reaches = reaches

    def fetch(self, job: FetchJob, on_done: Callable[[FetchResult], None]) -> None:
        assert job.key not in self.running, f"{job.key} is running already"
        assert len(set(job.target_pages)) == len(job.target_pages) == len(job.source_pages)
        self.running[job.key] = Copy(job, stopped=not self._reaches(job.peer))

    def cancel(self, key: Key) -> None:
        if key in self.running:
            self.running[key].stopped = self.running[key].cancelled = True

    def fence(self, peer: PeerAddress) -> None:
        """What `detach` does: whatever comes from this peer ends soon."""
        for copy in self.running.values():
            if copy.job.peer == peer:
                copy.stopped = True

    def land(self, key: Key, *, corrupt: bool = False) -> None:
        """The bytes arrive: as they stand in the peer's memory now, or with one of them wrong."""
        copy = self.running[key]
        copy.copied = True
        source = self._pools(copy.job.peer)
        for source_page, target_page in zip(copy.job.source_pages, copy.job.target_pages, strict=True):
            self._pool.data[target_page] = source.data[source_page]
        if corrupt:
            self._pool.data[copy.job.target_pages[0]] += 1.0

    def finish(self, key: Key) -> FetchResult:
        """The job ends; nothing of it lands any more."""
        copy = self.running.pop(key)
        wrong = copy.copied and pool_checksums(self._pool, copy.job.target_pages) != list(copy.job.checksums)
        error = "a checksum is wrong" if wrong else None if copy.copied else "stopped"
        return FetchResult(
            key=key,
            peer=copy.job.peer,
            ok=error is None,
            error=error,
            cancelled=error == "stopped" and copy.cancelled,
            bytes=len(copy.job.target_pages),
            seconds=0.0,
            queued_seconds=0.0,
            transport="test",
        )
