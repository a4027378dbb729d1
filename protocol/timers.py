"""Many deadlines, one of which is next: a heap with lazy deletion, over the caller's clock.

`set`, `cancel` and `pop_due` cost a logarithm of the number of deadlines; `next` is free.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Timers(Generic[K]):
    """At most one time per key."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._current: dict[K, tuple[float, int]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._current)

    def __contains__(self, key: K) -> bool:
        return key in self._current

    def set(self, key: K, when: float) -> None:
        """Let `key` be due at `when`, instead of any earlier setting."""
        number = next(self._numbers)
        self._current[key] = (when, number)
        heapq.heappush(self._heap, (when, number, key))
        if len(self._heap) > 2 * len(self._current) + 64:
            self._heap = [(when, number, key) for key, (when, number) in self._current.items()]
            heapq.heapify(self._heap)
        self._drop_stale()

    def cancel(self, key: K) -> None:
        """Forget `key`; nothing happens when it is not set."""
        self._current.pop(key, None)
        self._drop_stale()

    def next(self) -> float | None:
        """The earliest time set."""
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: float) -> Iterator[K]:
        """Take the keys whose time has come, earliest first. Setting and cancelling in between is allowed."""
        while self._heap and self._heap[0][0] <= now:
            _, _, key = heapq.heappop(self._heap)
            del self._current[key]
            self._drop_stale()
            yield key

    def _drop_stale(self) -> None:
        while self._heap and self._current.get(self._heap[0][2], (0.0, -1))[1] != self._heap[0][1]:
            heapq.heappop(self._heap)
