"""What a server has to give: a pool of pages, and what a request for pages or grains of it comes to."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from protocol.handshake import PoolShape
from transfer.grain_cursor import GrainCursor, SealedInt8, as_stored, sealed_bytes
from transfer.grains import PoolGrains
from transfer.int8_codec import Int8Codec
from transfer.span_io import socket_spans
from transfer.spans import Runs
from transfer.wire import Want
from transfer.wire_grains import ask_bytes, asked_grid, decode_checksums, expand
from transfer.wire_requests import RequestHead, decode_runs, runs_are_inside


@dataclass(frozen=True, kw_only=True)
class ServedRegion:
    """What a server serves, and which life of it. `fd` is the memory's, `view` its bytes."""

    view: memoryview
    fd: int
    page_bytes: int
    num_pages: int
    boot: int
    secret: bytes
    shape: PoolShape | None = None
    """None when only whole pages are served."""

    codec: Int8Codec | None = None
    """None when KV is served as it is stored only."""

    def serves(self, want: Want) -> set[Want]:
        """What may be asked for where `want` is served."""
        if want is not Want.PAGES or self.shape is None:
            return {want}
        return {want, Want.GRAINS} if self.codec is None else {want, Want.GRAINS, Want.INT8}

    def most(self, want: Want) -> int:
        """More pages or grains than this are in no request."""
        return self.num_pages * (1 if want is Want.PAGES or self.shape is None else self.shape.page_size)


class Outgoing(Protocol):
    """Bytes on their way to a socket."""

    @property
    def left(self) -> int:
        """Bytes not passed yet."""

    def send(self, sock: socket.socket) -> int:
        """Send the next bytes; how many the socket took. Raises `OSError`, `BlockingIOError` when it takes none."""

    def drop(self) -> None:
        """Pass all that is left and let go of the memory."""


def asked(
    region: ServedRegion, want: Want, head: RequestHead, body: bytes, *, key: bytes, call_bytes: int
) -> Outgoing | None:
    """The bytes that a request wants; None when the region has no such pages or grains, or they are not what `head`
    says. Raises `WireError` for a wrong tag."""
    runs = decode_runs(key, head, body, ask_bytes=ask_bytes(want))
    if want is not Want.PAGES:
        return _grains(region, want, head, body, runs, key=key, call_bytes=call_bytes)
    size = region.page_bytes
    if not runs_are_inside(runs, head, num_pages=region.num_pages, page_bytes=size):
        return None
    return socket_spans(region.view, *(runs.T * size), call_bytes=call_bytes)


def _grains(
    region: ServedRegion, want: Want, head: RequestHead, body: bytes, runs: Runs, *, key: bytes, call_bytes: int
) -> Outgoing | None:
    assert region.shape is not None
    grid = asked_grid(body, region.shape, page_bytes=region.page_bytes)
    if grid is None:
        return None
    pool = PoolGrains(np.frombuffer(region.view, dtype=np.uint8)[: region.num_pages * region.page_bytes], grid)
    pack, size = as_stored(pool), grid.grain_bytes
    if want is Want.INT8:
        assert region.codec is not None
        checksums, size = decode_checksums(body, head), sealed_bytes(grid, region.codec.dtype)
        pack = SealedInt8(pool, grid, region.codec, checksums=checksums, key=key, job=head.job)
    if not runs_are_inside(runs, head, num_pages=pool.count, page_bytes=size):
        return None
    return GrainCursor(expand(runs), pack, size=size, call_bytes=call_bytes)
