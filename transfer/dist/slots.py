"""The memory that a taker receives into, as its replica sees it: a few slots, read-only, one piece in each."""

from __future__ import annotations

from collections import deque

import numpy as np

from transfer.dist.orders import RunnerOrder
from transfer.jobs import PageCopy
from transfer.landing import Landing
from transfer.memory import PeerMemory
from transfer.spans import blocks, coalesce

_BLOCK_BYTES = 512 << 10  # verified while it is still in the cache


class Slots:
    """Takes `fd` over. Raises `ValueError` when it is not the memory that `order` speaks of."""

    def __init__(self, fd: int, order: RunnerOrder) -> None:
        self._memory = PeerMemory(fd, nbytes=order.num_slots * order.slot_bytes)
        self._bytes = np.frombuffer(self._memory.view, dtype=np.uint8)
        self._slot_pages = order.slot_pages
        self.free = deque(range(order.num_slots))
        """Slots that no piece is on its way into."""

    def land(self, slot: int, copy: PageCopy, count: int, landing: Landing, transport: str) -> None:
        """Copy the next `count` pages of `copy` out of `slot` into our pool, and verify them, block by block.

        Raises `LandingError`, and `InjectedFault` when a test says so.
        """
        size, begin = copy.page_bytes, slot * self._slot_pages
        targets = copy.job.target_pages[copy.done_pages : copy.done_pages + count]
        spans = coalesce(range(begin, begin + count), targets)
        for block in blocks(spans, max_pages=max(1, _BLOCK_BYTES // size)):
            landing.before(copy, transport)
            for first, to, length in block:
                landing.bytes[to * size : (to + length) * size] = self._bytes[first * size : (first + length) * size]
            landing.landed(copy, transport, sum(span.length for span in block))

    def close(self) -> None:
        """Unmap the memory."""
        del self._bytes
        self._memory.close()
