"""Many small ranges of a pool on their way to a socket, gathered a few at a time: the like of `cursor.RangeCursor`."""

from __future__ import annotations

import numpy as np

from transfer.span_copy import Numbers, PackedRun, SpanCopier

PACKED_BELOW = 64 << 10
"""Ranges shorter than this on average cost the interpreter and the kernel more than another copy does."""


class PackedCursor:
    """Walks the bytes of `lengths` at `offsets` of `view` as far as the socket takes them; they are gathered when their
    turn comes, `call_bytes` bytes at once, which should fit the cache."""

    def __init__(self, view: memoryview, offsets: Numbers, lengths: Numbers, *, call_bytes: int) -> None:
        self.left = int(lengths.sum())
        """Bytes not passed yet."""
        packed = np.empty(min(call_bytes, self.left), dtype=np.uint8)
        pool = np.frombuffer(view, dtype=np.uint8)
        self._run: PackedRun | None = SpanCopier().gather(pool, offsets, lengths, into=packed)
        self._packed = packed.data
        self._ready = memoryview(b"")

    def buffers(self) -> list[memoryview]:
        """The next bytes, in order; empty when none are left."""
        if not self._ready and self._run is not None and self._run.left:
            self._ready = self._packed[: self._run.advance(len(self._packed))]
        return [self._ready] if self._ready else []

    def advance(self, count: int) -> None:
        """Pass `count` bytes, at most those that `buffers` showed."""
        self.left -= count
        self._ready = self._ready[count:]

    def drop(self) -> None:
        """Pass all that is left and let go of the memory, which could not be unmapped otherwise."""
        self.left, self._run, self._ready = 0, None, memoryview(b"")
