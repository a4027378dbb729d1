"""A place in a list of byte ranges of one memory: what a socket sends from, or receives into, next."""

from __future__ import annotations

from collections.abc import Sequence

_MAX_BUFFERS = 256  # a quarter of the kernel's limit on buffers per call


class RangeCursor:
    """Walks `ranges`, each `(offset, length)` in bytes of `view`, as far as the socket takes it at a time."""

    def __init__(self, view: memoryview, ranges: Sequence[tuple[int, int]]) -> None:
        self._view = view
        self._ranges = ranges
        self._index = 0
        self._inside = 0  # bytes of ranges[index] already passed
        self.left = sum(length for _, length in ranges)
        """Bytes not passed yet."""

    def buffers(self, max_bytes: int) -> list[memoryview]:
        """The next bytes, at most `max_bytes`, in order."""
        buffers: list[memoryview] = []
        index, inside = self._index, self._inside
        while max_bytes and index < len(self._ranges) and len(buffers) < _MAX_BUFFERS:
            offset, length = self._ranges[index]
            taken = min(length - inside, max_bytes)
            buffers.append(self._view[offset + inside : offset + inside + taken])
            max_bytes -= taken
            index, inside = index + 1, 0
        return buffers

    def advance(self, count: int) -> None:
        """Pass `count` bytes, at most those that `buffers` showed."""
        self.left -= count
        while count:
            length = self._ranges[self._index][1] - self._inside
            if count < length:
                self._inside += count
                return
            count -= length
            self._index, self._inside = self._index + 1, 0
