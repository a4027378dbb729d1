"""What a page connection asks for and where it puts what comes: whole pages, or grains of a pool of another shape.

A payload belongs to the connection whose copy it is for, and lives as long as that copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from transfer.cursor import RangeCursor
from transfer.grain_cursor import sealed_bytes
from transfer.grains import Bytes
from transfer.jobs import PageCopy, Peer
from transfer.landing import Landing
from transfer.packed_cursor import PACKED_BELOW
from transfer.span_copy import PackedRun, SpanCopier
from transfer.spans import Runs, runs
from transfer.wire import Want
from transfer.wire_grains import encode_ask, encode_checksums
from transfer.wire_requests import encode_request

_PACKED_BYTES = 512 << 10


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
    if peer.coded is not None:
        return Want.INT8
    return Want.PAGES if peer.cut is None else Want.GRAINS


def bytes_on_the_way(copy: PageCopy) -> int:
    """Of all that `copy` asks for."""
    if copy.peer.coded is None:
        return copy.total_bytes
    return copy.num_pages * sealed_bytes(copy.peer.coded.cut.target, copy.peer.coded.codec.dtype)


def encode_copy(key: bytes, copy: PageCopy, *, job: int) -> bytes:
    """The request for all of `copy`."""
    coded = copy.peer.coded
    cut = copy.peer.cut if coded is None else coded.cut
    return encode_request(
        key,
        boot=copy.peer.address.boot,
        job=job,
        runs=runs(copy.job.source_pages),
        page_bytes=bytes_on_the_way(copy) // copy.num_pages,
        ask=b"" if cut is None else encode_ask(cut.source),
        rest=encode_checksums(copy.job.checksums, copy.num_pages) if coded is not None else b"",
    )


def payload_of(landing: Landing, copy: PageCopy, *, transport: str, call_bytes: int, key: bytes, job: int) -> Payload:
    """For `copy`, of which nothing has come yet; asked for by request `job` of the connection with `key`."""
    if copy.peer.coded is not None:
        size = bytes_on_the_way(copy) // copy.num_pages

        def land_coded(grains: Bytes) -> None:
            landing.coded(copy, transport, grains.reshape(-1, size), key=key, job=job)

        return GrainPayload(land_coded, count=copy.num_pages, size=size, call_bytes=call_bytes)
    if copy.peer.cut is not None:

        def land(grains: Bytes) -> None:
            landing.packed(copy, transport, grains)

        return GrainPayload(land, count=copy.num_pages, size=copy.page_bytes, call_bytes=call_bytes)
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
        packed = np.empty(min(_PACKED_BYTES, copy.total_bytes), dtype=np.uint8)
        self._run: PackedRun | None = SpanCopier().scatter(landing.bytes, offsets, lengths, out_of=packed)
        self._packed = packed.data

    @property
    def left(self) -> int:
        return 0 if self._run is None else self._run.left

    def buffers(self) -> list[memoryview]:
        return [self._packed[: self.left]] if self.left else []

    def received(self, count: int) -> None:
        assert self._run is not None
        copy = self._copy
        self._run.advance(count)
        complete = (copy.total_bytes - self._run.left) // copy.page_bytes - copy.done_pages
        if complete:
            self._landing.landed(copy, self._transport, complete)

    def drop(self) -> None:
        self._run = None


class GrainPayload:
    """Receives some grains at a time beside the pages; `land` verifies them there and puts them in their places."""

    def __init__(self, land: Callable[[Bytes], None], *, count: int, size: int, call_bytes: int) -> None:
        self._land = land
        self.left = count * size
        self._packed = np.empty(min(max(1, call_bytes // size), count) * size, dtype=np.uint8)
        self._filled = 0

    def buffers(self) -> list[memoryview]:
        end = min(len(self._packed), self._filled + self.left)
        return [self._packed[self._filled : end].data] if self.left else []

    def received(self, count: int) -> None:
        self.left -= count
        self._filled += count
        if self._filled == len(self._packed) or not self.left:
            self._land(self._packed[: self._filled])
            self._filled = 0

    def drop(self) -> None:
        self.left = 0
        self._packed = np.empty(0, dtype=np.uint8)
