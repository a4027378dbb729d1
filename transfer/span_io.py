"""Moves many byte spans of a memory through a descriptor without a Python step per span.

`socket_spans` is what a socket is sent from, or receives into, next; `read_spans` fills spans out of files. The kernel
copies straight between them and the memory. Compiled on first use; where no compiler is, `cursor.py` and a read per
span do the same, slower for small spans. Other Python threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import os
import socket
from collections.abc import Sequence

import numpy as np

from transfer.cursor import RangeCursor
from transfer.native import I64, INT, PTR, load_c
from transfer.span_copy import Bytes, Numbers

_SENT_AT_ONCE = 8
"""Calls to a socket that takes everything, before anybody else has a turn."""


class SpanCursor:
    """The compiled like of `cursor.RangeCursor`. Refers to the memory until all is passed or dropped."""

    def __init__(
        self, library: ctypes.CDLL, view: memoryview, offsets: Numbers, lengths: Numbers, *, call_bytes: int
    ) -> None:
        count, spans = len(lengths), (offsets.ctypes.data, lengths.ctypes.data)
        self.left = int(library.pd_spans_inside(view.nbytes, *spans, count))
        """Bytes not passed yet."""
        if self.left < 0:
            raise _outside(view, offsets, lengths, -1 - self.left)
        self._library = library
        self._memory: Bytes | None = np.frombuffer(view, dtype=np.uint8)
        self._spans = (offsets, lengths)  # kept: the library reads them by their addresses
        self._next = (I64 * 2)()  # span, and byte in it
        self._arguments = (self._memory.ctypes.data, *spans, count, self._next, call_bytes)
        self._most = call_bytes * _SENT_AT_ONCE

    def send(self, sock: socket.socket) -> int:
        """Send the next bytes, in several calls if the socket takes them; how many it took. Raises `OSError`,
        `BlockingIOError` when it takes none."""
        return self._passed(self._library.pd_send_spans(sock.fileno(), *self._arguments, self._most))

    def receive(self, sock: socket.socket) -> int:
        """Receive the next bytes; how many came, 0 when the other side closed the connection. Raises `OSError`,
        `BlockingIOError` when none are there."""
        return self._passed(self._library.pd_receive_spans(sock.fileno(), *self._arguments))

    def drop(self) -> None:
        """Pass all that is left and let go of the memory, which could not be unmapped otherwise."""
        self.left, self._memory = 0, None

    def _passed(self, moved: int) -> int:
        if moved < 0:
            raise OSError(-moved, os.strerror(-moved))
        self.left -= moved
        return moved


def socket_spans(
    view: memoryview, offsets: Numbers, lengths: Numbers, *, call_bytes: int, native: bool = True
) -> SpanCursor | RangeCursor:
    """The bytes of `lengths` at `offsets` of `view`, of which a call to the socket is offered at most `call_bytes`.
    Raises `ValueError` for a span that is not inside."""
    library = _library() if native else None
    if library is not None:
        offsets, lengths = (np.ascontiguousarray(numbers, dtype=np.int64) for numbers in (offsets, lengths))
        return SpanCursor(library, view, offsets, lengths, call_bytes=call_bytes)
    inside = (lengths >= 0) & (offsets >= 0) & (offsets <= view.nbytes - lengths)
    if not inside.all():
        raise _outside(view, offsets, lengths, int(np.flatnonzero(~inside)[0]))
    return RangeCursor(view, zip(offsets.tolist(), lengths.tolist(), strict=True), call_bytes=call_bytes)


def _outside(view: memoryview, offsets: Numbers, lengths: Numbers, index: int) -> ValueError:
    return ValueError(f"{lengths[index]} bytes at {offsets[index]} of a memory of {view.nbytes} bytes")


def read_spans(
    files: Sequence[int], places: Sequence[int], memory: Bytes, targets: Numbers, size: int, *, native: bool = True
) -> int:
    """Read `size` bytes at `places[i]` of the open file `files[i]` to `targets[i]` of `memory`, for every i.

    Returns how many were read in full: less than all where a file ends before that. Raises `OSError`, and `ValueError`
    for a target that is not inside.
    """
    if targets.min() < 0 or targets.max() > memory.nbytes - size:
        raise ValueError(f"targets from {targets.min()} to {targets.max()} of a memory of {memory.nbytes} bytes")
    library, count = _library() if native else None, len(files)
    if library is None:
        for index, (file, place, start) in enumerate(zip(files, places, targets.tolist(), strict=True)):
            if os.preadv(file, [memory[start : start + size].data], place) != size:
                return index
        return count
    fds, at = np.array(files, dtype=np.intc), np.array(places, dtype=np.int64)
    targets = np.ascontiguousarray(targets, dtype=np.int64)
    done = library.pd_read_spans(fds.ctypes.data, at.ctypes.data, memory.ctypes.data, targets.ctypes.data, size, count)
    if done < 0:
        raise OSError(-done, os.strerror(-done))
    return int(done)


def prepare() -> None:
    """Have the code compiled, on a machine's first start, before the first bytes need it."""
    _library()


@functools.cache  # a loaded library is its process's anyway
def _library() -> ctypes.CDLL | None:
    functions = {
        "pd_spans_inside": (I64, (I64, PTR, PTR, I64)),
        "pd_send_spans": (I64, (INT, PTR, PTR, PTR, I64, PTR, I64, I64)),
        "pd_receive_spans": (I64, (INT, PTR, PTR, PTR, I64, PTR, I64)),
        "pd_read_spans": (I64, (PTR, PTR, PTR, PTR, I64, I64)),
    }
    without = "spans go through Python to sockets and out of files, slower for small ones"
    return load_c("span_io", functions, without=without)
