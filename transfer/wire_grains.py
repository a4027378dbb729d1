"""Requests for grains: which heads and how many tokens at a time, said before the runs of a request (`wire.py`)."""

from __future__ import annotations

import struct

from protocol.handshake import PoolShape
from transfer.layout import Grid, LayoutMismatch, whole_grid
from transfer.spans import Runs
from transfer.wire import Want

_ASK = struct.Struct(">III")  # tokens of a grain, first head, heads; as the giver's pool counts them

ASK_BYTES = {Want.PAGES: 0, Want.GRAINS: _ASK.size}
"""Bytes before the runs of a request, by the connection's kind."""


def encode_ask(grid: Grid) -> bytes:
    """For the grains of `grid`, a view of the giver's pool."""
    return _ASK.pack(grid.tokens, grid.first_head, grid.heads)


def asked_grid(ask: bytes, shape: PoolShape, *, page_bytes: int) -> Grid | None:
    """The view of our pool that `ask` means; None when it has no such grains."""
    tokens, first_head, heads = _ASK.unpack(ask)
    try:
        grid = whole_grid(shape, page_bytes=page_bytes, tokens=tokens)
    except LayoutMismatch:
        return None
    if not 0 < heads <= grid.kv_heads - first_head:
        return None
    return Grid(
        layers=grid.layers,
        kv_heads=grid.kv_heads,
        page_size=grid.page_size,
        row_bytes=grid.row_bytes,
        tokens=tokens,
        first_head=first_head,
        heads=heads,
    )


def expand(runs: Runs) -> list[int]:
    """Every page or grain of `runs`, in order."""
    return [index for first, count in runs.tolist() for index in range(first, first + count)]
