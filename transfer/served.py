"""What a server has to give: a pool of pages, and what a request for pages or grains of it comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from protocol.handshake import PoolShape
from transfer.cursor import RangeCursor
from transfer.grain_cursor import GrainCursor
from transfer.packed_cursor import PACKED_BELOW, PackedCursor
from transfer.spans import Runs
from transfer.wire import RequestHead, Want, runs_are_inside
from transfer.wire_grains import asked_grid, expand


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

    def serves(self, want: Want) -> set[Want]:
        """What may be asked for where `want` is served."""
        return {want, Want.GRAINS} if want is Want.PAGES and self.shape is not None else {want}

    def most_runs(self, want: Want) -> int:
        """More are in no request."""
        return self.num_pages * (self.shape.page_size if want is Want.GRAINS and self.shape is not None else 1)


class Outgoing(Protocol):
    """Bytes on their way to a socket."""

    @property
    def left(self) -> int:
        """Bytes not passed yet."""

    def buffers(self) -> list[memoryview]:
        """The next bytes, in order; empty when none are left."""

    def advance(self, count: int) -> None:
        """Pass `count` bytes, at most those that `buffers` showed."""

    def drop(self) -> None:
        """Pass all that is left and let go of the memory."""


def nothing(region: ServedRegion) -> Outgoing:
    """No bytes at all."""
    return RangeCursor(region.view, (), call_bytes=1)


def asked(
    region: ServedRegion,
    want: Want,
    head: RequestHead,
    *,
    ask: bytes,
    runs: Runs,
    call_bytes: int,
) -> Outgoing | None:
    """The bytes of `runs`; None when the region has no such pages or grains, or they are not what `head` says."""
    if want is Want.GRAINS:
        assert region.shape is not None
        grid = asked_grid(ask, region.shape, page_bytes=region.page_bytes)
        if grid is None:
            return None
        if not runs_are_inside(runs, head, num_pages=region.num_pages * grid.per_page, page_bytes=grid.grain_bytes):
            return None
        pool = region.view[: region.num_pages * region.page_bytes]
        return GrainCursor(pool, grid, expand(runs), call_bytes=call_bytes)
    size = region.page_bytes
    if not runs_are_inside(runs, head, num_pages=region.num_pages, page_bytes=size):
        return None
    if head.byte_length < PACKED_BELOW * len(runs):
        offsets, lengths = np.ascontiguousarray(runs.T * size)
        return PackedCursor(region.view, offsets, lengths, call_bytes=call_bytes)
    return RangeCursor(region.view, (runs * size).tolist(), call_bytes=call_bytes)
