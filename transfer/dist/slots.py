"""The memory that a taker receives into, as its replica sees it: a few slots, read-only, one piece in each."""

from __future__ import annotations

from collections import deque

import numpy as np

from transfer.dist.orders import RunnerOrder
from transfer.jobs import PageCopy
from transfer.landing import Landing
from transfer.memory import PeerMemory
from transfer.page_run import PageRun


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
        begin = slot * self._slot_pages
        run = PageRun(landing, copy, self._bytes, np.arange(begin, begin + count), transport=transport)
        while run.left:
            run.step()

    def close(self) -> None:
        """Unmap the memory."""
        del self._bytes
        self._memory.close()
