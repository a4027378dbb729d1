"""Writes the pages that a replica offers into its folder, where any peer may take them.

Lifecycle: the constructor makes the folder and starts one thread; `offer` queues pages and never waits for the disk;
`close` ends the thread and removes the folder. A replica that is killed leaves its folder behind, which any living
one removes after `SpoolLimits.leftover_s` without a sign of life.

A page may be freed and filled anew while it waits here. So it is copied first and the copy is hashed: what does not
have the checksum that was offered is never published. Whatever does not get into the folder is entered in the index
as refused, so that nobody waits for it. The oldest packs go when the folder is larger or older than its limits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from transfer.checksum import page_checksums
from transfer.disk.folders import check_shared, leftovers, remove_spool, spool_name
from transfer.disk.index import Refusal
from transfer.disk.packs import PackStore, SpoolLimits

logger = logging.getLogger(__name__)

_PACK_BYTES = 4 << 20
"""Of one pack at most: a reader begins when the first is complete, while the next is being written."""


class Spool:
    """Implements `transfer.door.Door`. `view` is the pool, which must outlive the spool; `folder` the shared folder.

    Raises `ValueError` for a folder or limits that cannot work.
    """

    name = "disk"

    def __init__(
        self,
        *,
        folder: Path,
        view: memoryview,
        page_bytes: int,
        replica_id: str,
        boot: int,
        limits: SpoolLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_shared(folder)
        limits = limits or SpoolLimits()
        if limits.max_bytes < 4 * page_bytes:
            raise ValueError(
                f"a spool of {limits.max_bytes} bytes is too small for pages of {page_bytes} bytes; "
                f"raise transfer.folder_max_mb to {-(-4 * page_bytes >> 20)} at least"
            )
        self._shared, self._own = folder, spool_name(replica_id, boot)
        self._clock = clock
        self._silent_s = limits.leftover_s
        self._page_bytes = page_bytes
        self._per_pack = max(1, min(_PACK_BYTES, limits.max_bytes // 4) // page_bytes)
        self._source = np.frombuffer(view, dtype=np.uint8)
        self._staging = np.empty(self._per_pack * page_bytes, dtype=np.uint8)
        try:
            self._packs = PackStore(folder / self._own, limits=limits, clock=clock)
        except OSError as error:
            raise ValueError(f"transfer.folder {str(folder)!r} cannot be written to: {error}") from error
        self._ready = threading.Condition()  # guards what follows
        self._max_waiting = max(1, limits.max_waiting_bytes // page_bytes)
        self._waiting: deque[tuple[int, int]] = deque()
        self._refused: deque[int] = deque(maxlen=self._max_waiting)
        self._writing = self._closing = False
        self._thread = threading.Thread(target=self._run, name="page-spool", daemon=True)
        self._thread.start()

    def address(self) -> str:
        """The name of our folder in the shared one, which may be mounted anywhere."""
        return self._own

    def offer(self, pages: Sequence[int], checksums: Sequence[int]) -> None:
        """These pages are being offered to peers: write them soon. Returns at once."""
        with self._ready:
            for page, checksum in zip(pages, checksums, strict=True):
                if len(self._waiting) < self._max_waiting:
                    self._waiting.append((page, checksum))
                else:
                    self._refused.append(checksum)
            self._ready.notify_all()

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether all that was offered was written or refused in time."""
        with self._ready:
            return self._ready.wait_for(lambda: not (self._waiting or self._refused or self._writing), timeout_s)

    def close(self, *, timeout_s: float) -> None:
        """Remove the folder, whatever still waits. Raises `TimeoutError` when the disk does not answer in time."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._thread.name} is still writing after {timeout_s} s")

    # ---- in the spool's thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        due = self._clock()
        while True:
            if self._clock() >= due:
                self._guarded(self._tidy)
                due = self._clock() + self._silent_s / 4
            with self._ready:
                self._ready.wait_for(lambda: self._waiting or self._refused or self._closing, self._silent_s / 4)
                if self._closing:
                    break
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._per_pack))]
                busy = list(self._refused)
                self._refused.clear()
                self._writing = True
            self._guarded(self._write, batch, busy)
            with self._ready:
                self._writing = False
                self._ready.notify_all()
        self._guarded(self._packs.remove)
        del self._source  # or the pool could not be unmapped

    def _guarded(self, chore: Callable[..., None], *arguments: object) -> None:
        try:
            chore(*arguments)
        except OSError as error:
            logger.warning("the spool %s: %s", self._own, error)
        except Exception:  # a bug; later pages can still be written
            logger.exception("the spool %s failed", self._own)

    def _write(self, batch: Sequence[tuple[int, int]], busy: Sequence[int]) -> None:
        """Copy what is worth writing, one page after the other, and publish what is still what it was."""
        self._packs.notice_removal()
        size, kept = self._page_bytes, dict[int, None]()
        refusals = [(checksum, Refusal.BUSY) for checksum in busy if not self._packs.is_fresh(checksum)]
        for page, checksum in batch:
            if checksum == 0 or checksum in kept or self._packs.is_fresh(checksum):
                continue
            start = len(kept) * size
            self._staging[start : start + size] = self._source[page * size : (page + 1) * size]
            if page_checksums(self._staging.data, size, [len(kept)]) == [checksum]:
                kept[checksum] = None
            else:
                refusals.append((checksum, Refusal.REUSED))
        self._packs.add(self._staging.data[: len(kept) * size], list(kept), refusals)

    def _tidy(self) -> None:
        self._packs.tidy()
        for path in leftovers(self._shared, own=self._own, silent_s=self._silent_s):
            logger.info("removing %s, whose replica is gone", path)
            self._guarded(remove_spool, path)
