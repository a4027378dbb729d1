"""What a page connection asks for and where it puts what comes: whole pages, or grains of a pool of another shape.

A payload belongs to the connection whose copy it is for, and lives as long as that copy.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol

import numpy as np

from transfer.grain_cursor import sealed_bytes
from transfer.grains import Bytes
from transfer.jobs import PageCopy, Peer
from transfer.landing import Landing
from transfer.span_io import socket_spans
from transfer.spans import runs
from transfer.wire import Want
from transfer.wire_grains import encode_ask, encode_checksums
from transfer.wire_requests import encode_request


class Payload(Protocol):
    """Bytes of one copy, in the order in which they come."""

    @property
    def left(self) -> int:
        """Bytes not received yet."""

    def receive(self, sock: socket.socket) -> int:
        """Receive the next bytes; how many came, 0 when the peer closed the connection. Raises `LandingError` when what
        is complete now is not what was promised, and `OSError`, `BlockingIOError` when no bytes are there."""

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
        runs=runs(copy.sources),
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
    return PagePayload(landing, copy, transport=transport, call_bytes=call_bytes)


class PagePayload:
    """Receives straight into the target pages, which are verified as they complete."""

    def __init__(self, landing: Landing, copy: PageCopy, *, transport: str, call_bytes: int) -> None:
        self._landing = landing
        self._copy = copy
        self._transport = transport
        offsets, lengths = runs(copy.targets).T * copy.page_bytes
        self._spans = socket_spans(landing.view, offsets, lengths, call_bytes=call_bytes)

    @property
    def left(self) -> int:
        return self._spans.left

    def receive(self, sock: socket.socket) -> int:
        copy, count = self._copy, self._spans.receive(sock)
        complete = (copy.total_bytes - self._spans.left) // copy.page_bytes - copy.done_pages
        if complete:
            self._landing.landed(copy, self._transport, complete)
        return count

    def drop(self) -> None:
        self._spans.drop()


class GrainPayload:
    """Receives some grains at a time beside the pages; `land` verifies them there and puts them in their places."""

    def __init__(self, land: Callable[[Bytes], None], *, count: int, size: int, call_bytes: int) -> None:
        self._land = land
        self.left = count * size
        self._packed = np.empty(min(max(1, call_bytes // size), count) * size, dtype=np.uint8)
        self._filled = 0

    def receive(self, sock: socket.socket) -> int:
        end = min(len(self._packed), self._filled + self.left)
        count = sock.recv_into(self._packed[self._filled : end].data)
        self.left -= count
        self._filled += count
        if self._filled == len(self._packed) or not self.left:
            self._land(self._packed[: self._filled])
            self._filled = 0
        return count

    def drop(self) -> None:
        self.left = 0
        self._packed = np.empty(0, dtype=np.uint8)
