"""A few threads that take the waiting copy with the least left to do, again and again."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable

from transfer.jobs import PageCopy
from transfer.transport import turn


class CopyCrew:
    """Starts `num_threads` threads at once; each calls `work(copy)` for one copy after the other. `work` must not
    raise."""

    def __init__(self, *, num_threads: int, work: Callable[[PageCopy], None]) -> None:
        self._ready = threading.Condition()
        self._heap: list[tuple[float, int, PageCopy]] = []
        self._waiting: set[PageCopy] = set()  # those in the heap that were not removed since
        self._order = itertools.count()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"page-copy-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def has_waiting(self) -> bool:
        with self._ready:
            return bool(self._waiting)

    def push(self, copy: PageCopy) -> None:
        """Have `copy` worked on when its turn comes."""
        with self._ready:
            heapq.heappush(self._heap, (turn(copy), next(self._order), copy))
            self._waiting.add(copy)
            self._ready.notify()

    def remove(self, copy: PageCopy) -> bool:
        """Take a waiting copy back; False when no thread is going to begin it anyway."""
        with self._ready:
            if copy not in self._waiting:
                return False
            self._waiting.remove(copy)
            return True

    def should_yield(self, copy: PageCopy) -> bool:
        """Whether a waiting copy has its turn before `copy`, which is being worked on."""
        with self._ready:
            return bool(self._waiting) and self._heap[0][0] < turn(copy)

    def close(self, *, timeout_s: float) -> None:
        """End the threads. Raises `TimeoutError` when one does not come back from its work in time."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)
            if thread.is_alive():
                raise TimeoutError(f"{thread.name} is still copying after {timeout_s} s")

    def _run(self, work: Callable[[PageCopy], None]) -> None:
        while True:
            with self._ready:
                copy = self._pop()
                while copy is None:
                    if self._closing:
                        return
                    self._ready.wait()
                    copy = self._pop()
            work(copy)

    def _pop(self) -> PageCopy | None:
        while self._heap:
            copy = heapq.heappop(self._heap)[2]
            if copy in self._waiting:
                self._waiting.remove(copy)
                return copy
        return None
