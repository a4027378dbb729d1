"""What a page connection asks for and where it puts what comes: whole pages, or grains of a pool of another shape.

A payload belongs to the connection whose copy it is for, and lives as long as that copy.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from transfer.cursor import RangeCursor
from transfer.jobs import PageCopy, Peer
from transfer.landing import Landing
from transfer.packed_cursor import PACKED_BELOW
from transfer.span_copy import PackedRun, SpanCopier
from transfer.spans import Runs, runs
from transfer.wire import Want, encode_request
from transfer.wire_grains import encode_ask

_PACKED_BYTES = 256 << 10


class Payload(Protocol):
    """Bytes of one copy, in the order in which they come."""

    @property
    def left(self) -> int:
        """Bytes not received yet."""

    def buffers(self) -> list[memoryview]:
        """Where the next bytes go."""

    def received(self, count: int) -> None:
        """`count` bytes were put there. Raises `LandingError` when what is complete now is not what was promised."""

    def drop(self) -> None:
        """Let go of the memory."""


def want_of(peer: Peer) -> Want:
    """The kind of connection that copies from `peer` need."""
    return Want.PAGES if peer.cut is None else Want.GRAINS


def encode_copy(key: bytes, copy: PageCopy, *, job: int) -> bytes:
    """The request for all of `copy`."""
    cut = copy.peer.cut
    return encode_request(
        key,
        boot=copy.peer.address.boot,
        job=job,
        runs=runs(copy.job.source_pages),
        page_bytes=copy.page_bytes,
        ask=b"" if cut is None else encode_ask(cut.source),
    )


def payload_of(landing: Landing, copy: PageCopy, *, transport: str, call_bytes: int) -> Payload:
    """For `copy`, of which nothing has come yet."""
    if copy.peer.cut is not None:
        return GrainPayload(landing, copy, transport=transport, call_bytes=call_bytes)
    targets = runs(copy.job.target_pages)
    if copy.total_bytes < PACKED_BELOW * len(targets):
        return ScatteredPayload(landing, copy, targets, transport=transport)
    return PagePayload(landing, copy, targets, transport=transport, call_bytes=call_bytes)


class PagePayload:
    """Receives straight into the target pages, which are verified as they complete."""

    def __init__(self, landing: Landing, copy: PageCopy, targets: Runs, *, transport: str, call_bytes: int) -> None:
        self._landing = landing
        self._copy = copy
        self._transport = transport
        self._cursor = RangeCursor(landing.view, (targets * copy.page_bytes).tolist(), call_bytes=call_bytes)

    @property
    def left(self) -> int:
        return self._cursor.left

    def buffers(self) -> list[memoryview]:
        return self._cursor.buffers()

    def received(self, count: int) -> None:
        copy = self._copy
        self._cursor.advance(count)
        complete = (copy.total_bytes - self._cursor.left) // copy.page_bytes - copy.done_pages
        if complete:
            self._landing.landed(copy, self._transport, complete)

    def drop(self) -> None:
        self._cursor.drop()


class ScatteredPayload:
    """Receives into a buffer that stays in the cache, and puts what came into the many short runs of target pages from
    there; pages are verified in their places as they complete."""

    def __init__(self, landing: Landing, copy: PageCopy, targets: Runs, *, transport: str) -> None:
        self._landing = landing
        self._copy = copy
        self._transport = transport
        offsets, lengths = np.ascontiguousarray(targets.T * copy.page_bytes)
        self._run: PackedRun | None = SpanCopier().scatter(landing.bytes, offsets, lengths)
        self._packed = memoryview(bytearray(min(_PACKED_BYTES, copy.total_bytes)))

    @property
    def left(self) -> int:
        return 0 if self._run is None else self._run.left

    def buffers(self) -> list[memoryview]:
        return [self._packed[: self.left]] if self.left else []

    def received(self, count: int) -> None:
        assert self._run is not None
        copy = self._copy
        self._run.advance(self._packed[:count])
        complete = (copy.total_bytes - self._run.left) // copy.page_bytes - copy.done_pages
        if complete:
            self._landing.landed(copy, self._transport, complete)

    def drop(self) -> None:
        self._run = None


class GrainPayload:
    """Receives some grains at a time beside the pages, verifies them there and puts them in their places."""

    def __init__(self, landing: Landing, copy: PageCopy, *, transport: str, call_bytes: int) -> None:
        self._landing = landing
        self._copy = copy
        self._transport = transport
        self.left = copy.total_bytes
        most = max(1, call_bytes // copy.page_bytes) * copy.page_bytes
        self._packed = np.empty(min(most, self.left), dtype=np.uint8)
        self._filled = 0

    def buffers(self) -> list[memoryview]:
        end = min(len(self._packed), self._filled + self.left)
        return [self._packed[self._filled : end].data] if self.left else []

    def received(self, count: int) -> None:
        self.left -= count
        self._filled += count
        if self._filled == len(self._packed) or not self.left:
            self._landing.packed(self._copy, self._transport, self._packed[: self._filled])
            self._filled = 0

    def drop(self) -> None:
        self.left = 0
        self._packed = np.empty(0, dtype=np.uint8)
