"""Requests for grains, and for KV in 8 bits: what of each page is wanted, said before the runs (`wire.py`).

In 8 bits the checksums that the owner of the pages stated can say nothing of the bytes on the way. So they go along
with the request, the giver compares them with what it is encoding, and seals each grain it sends: a tag under the
connection's key over the grain's place in the reply and its checksum as it is sent.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import xxhash

from protocol.handshake import PoolShape
from transfer.layout import Grid, LayoutMismatch, whole_grid
from transfer.spans import Runs
from transfer.wire import Want
from transfer.wire_requests import RequestHead

_ASK = struct.Struct(">III")  # tokens of a grain, first head, heads; as the giver's pool counts them
_SEALED = struct.Struct(">QQQ")
_CHECKSUM_BYTES = 8

SEAL_BYTES = 16


def ask_bytes(want: Want) -> int:
    """Before the runs of a request."""
    return 0 if want is Want.PAGES else _ASK.size


def body_bytes(want: Want, head: RequestHead) -> int:
    """Of all that follows `head`."""
    return ask_bytes(want) + head.runs_bytes + (_CHECKSUM_BYTES * head.num_pages if want is Want.INT8 else 0)


def encode_ask(grid: Grid) -> bytes:
    """For the grains of `grid`, a view of the giver's pool."""
    return _ASK.pack(grid.tokens, grid.first_head, grid.heads)


def asked_grid(body: bytes, shape: PoolShape, *, page_bytes: int) -> Grid | None:
    """The view of our pool that a request means; None when it has no such grains."""
    tokens, first_head, heads = _ASK.unpack_from(body)
    try:
        grid = whole_grid(shape, page_bytes=page_bytes, tokens=tokens)
    except LayoutMismatch:
        return None
    return replace(grid, first_head=first_head, heads=heads) if 0 < heads <= grid.kv_heads - first_head else None


def encode_checksums(checksums: Sequence[int], count: int) -> bytes:
    """What follows the runs in 8 bits: the checksums of `count` grains as they are stored, 0 where nobody knows."""
    return np.asarray(checksums or [0] * count, dtype=">u8").tobytes()


def decode_checksums(body: bytes, head: RequestHead) -> list[int]:
    """Of every grain asked for."""
    values: list[int] = np.frombuffer(body[-_CHECKSUM_BYTES * head.num_pages :], dtype=">u8").tolist()
    return values


def seal(key: bytes, *, job: int, index: int, coded: memoryview) -> bytes:
    """Of the grain that is the `index`-th in the reply to request `job`."""
    said = _SEALED.pack(job, index, xxhash.xxh3_64_intdigest(coded))
    return hmac.digest(key, b"grain" + said, "sha256")[:SEAL_BYTES]


def expand(runs: Runs) -> list[int]:
    """Every page or grain of `runs`, in order."""
    return [index for first, count in runs.tolist() for index in range(first, first + count)]
