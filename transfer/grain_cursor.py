"""The grains that a server sends, gathered out of its pool a few at a time: the like of `cursor.RangeCursor`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transfer.grains import Bytes, PoolGrains
from transfer.layout import Grid


class GrainCursor:
    """Walks `grains` of the pool `view` as far as the socket takes it at a time.

    Grains are packed when their turn comes, about `call_bytes` bytes at once.
    """

    def __init__(self, view: memoryview, grid: Grid, grains: Sequence[int], *, call_bytes: int) -> None:
        self.left = len(grains) * grid.grain_bytes
        """Bytes not passed yet."""
        self._pool: PoolGrains | None = PoolGrains(np.frombuffer(view, dtype=np.uint8), grid)
        self._grains = grains
        self._next = 0
        self._most = max(1, call_bytes // grid.grain_bytes)
        self._packed: Bytes = np.empty(min(self._most, len(grains)) * grid.grain_bytes, dtype=np.uint8)
        self._grain_bytes = grid.grain_bytes
        self._ready = memoryview(b"")

    def buffers(self) -> list[memoryview]:
        """The next bytes, in order; empty when none are left."""
        if not self._ready and self._pool is not None and self._next < len(self._grains):
            batch = self._grains[self._next : self._next + self._most]
            self._pool.gather(batch, self._packed)
            self._ready = self._packed[: len(batch) * self._grain_bytes].data
            self._next += len(batch)
        return [self._ready] if self._ready else []

    def advance(self, count: int) -> None:
        """Pass `count` bytes, at most those that `buffers` showed."""
        self.left -= count
        self._ready = self._ready[count:]

    def drop(self) -> None:
        """Pass all that is left and let go of the memory, which could not be unmapped otherwise."""
        self.left, self._pool, self._ready = 0, None, memoryview(b"")
