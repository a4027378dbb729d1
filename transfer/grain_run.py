"""Grains of a copy on their way into our pool out of a peer's pool of another shape, which is at hand as memory."""

from __future__ import annotations

import numpy as np

from transfer.grains import PoolGrains
from transfer.jobs import PageCopy
from transfer.landing import Landing
from transfer.span_copy import Bytes

_PACKED_BYTES = 256 << 10
"""Few enough that they are verified while they are still in the cache."""


class GrainRun:
    """The next grains of `copy` are those that its job names of `source`, the bytes of the whole pool. `step` moves a
    block of them by way of a buffer; between two steps the caller may give it up. It refers to `source` until it goes.
    """

    def __init__(self, landing: Landing, copy: PageCopy, source: Bytes, *, transport: str) -> None:
        assert copy.peer.cut is not None
        self._landing = landing
        self._copy = copy
        self._transport = transport
        self._source = PoolGrains(source, copy.peer.cut.source)
        self._most = max(1, _PACKED_BYTES // copy.page_bytes)
        self._packed = np.empty(min(self._most, copy.num_pages - copy.done_pages) * copy.page_bytes, dtype=np.uint8)

    @property
    def left(self) -> int:
        """Grains not moved yet."""
        return self._copy.num_pages - self._copy.done_pages

    def step(self) -> None:
        """Move the next block and verify it. Raises `LandingError`, and `InjectedFault` when a test says so."""
        copy = self._copy
        self._landing.before(copy, self._transport)
        batch = copy.job.source_pages[copy.done_pages : copy.done_pages + self._most]
        self._source.gather(batch, self._packed)
        self._landing.packed(copy, self._transport, self._packed[: len(batch) * copy.page_bytes])
