"""A place in a list of byte ranges of one memory: what a socket sends from, or receives into, next."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator

_MAX_BUFFERS = 64  # more are seldom filled by one call, and each costs even when it is not


class RangeCursor:
    """Walks `ranges`, each `(offset, length)` in bytes of `view`, as far as the socket takes it at a time.

    A call to the socket is offered about `call_bytes` bytes on average, and no single buffer is larger.
    """

    def __init__(self, view: memoryview, ranges: Iterable[tuple[int, int]], *, call_bytes: int) -> None:
        self._buffers = [view[start:end] for start, end in _pieces(ranges, call_bytes)]
        self.left = sum(map(len, self._buffers))
        """Bytes not passed yet."""
        mean = max(1, self.left // max(1, len(self._buffers)))
        self._per_call = max(1, min(_MAX_BUFFERS, call_bytes // mean))
        self._next = 0

    def send(self, sock: socket.socket) -> int:
        """Send the next bytes; how many the socket took. Raises `OSError`, `BlockingIOError` when it takes none."""
        return self._passed(sock.sendmsg(self._offered(), (), socket.MSG_NOSIGNAL))

    def receive(self, sock: socket.socket) -> int:
        """Receive the next bytes; how many came, 0 when the other side closed the connection. Raises `OSError`,
        `BlockingIOError` when none are there."""
        return self._passed(sock.recvmsg_into(self._offered())[0])

    def drop(self) -> None:
        """Pass all that is left and let go of the memory, which could not be unmapped otherwise."""
        self._buffers = []
        self._next = self.left = 0

    def _offered(self) -> list[memoryview]:
        return self._buffers[self._next : self._next + self._per_call]

    def _passed(self, count: int) -> int:
        self.left -= count
        rest = count
        while rest:
            buffer = self._buffers[self._next]
            if rest < len(buffer):
                self._buffers[self._next] = buffer[rest:]
                break
            rest -= len(buffer)
            self._next += 1
        return count


def _pieces(ranges: Iterable[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """Start and end of the ranges, cut where they are longer than `most`."""
    for offset, length in ranges:
        for start in range(offset, offset + length, most):
            yield start, min(start + most, offset + length)
