"""The grains that a server sends, made out of its pool a few at a time: the like of `cursor.RangeCursor`.

A *packer* writes some grains one behind the other as they are to be sent; it refers to the pool's memory.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import numpy as np
import xxhash

from transfer.grains import Bytes, PoolGrains
from transfer.int8_codec import Int8Codec, coded_bytes
from transfer.layout import Grid
from transfer.wire_grains import SEAL_BYTES, seal

Packer = Callable[[int, Sequence[int], Bytes], None]
"""(how many were before them, grains, where to)."""


class GrainChanged(Exception):
    """A page is not what its owner offered any more."""


class GrainCursor:
    """Walks `grains` as far as the socket takes them at a time; each is `size` bytes.

    They are packed when their turn comes, about `call_bytes` bytes at once.
    """

    def __init__(self, grains: Sequence[int], pack: Packer, *, size: int, call_bytes: int) -> None:
        self.left = len(grains) * size
        """Bytes not passed yet."""
        self._pack: Packer | None = pack
        self._grains = grains
        self._size = size
        self._next = 0
        self._most = max(1, call_bytes // size)
        self._packed: Bytes = np.empty(min(self._most, len(grains)) * size, dtype=np.uint8)
        self._ready = memoryview(b"")

    def send(self, sock: socket.socket) -> int:
        """Send the next bytes; how many the socket took. Raises `GrainChanged`, and `OSError`, `BlockingIOError` when
        it takes none."""
        if not self._ready and self._pack is not None:
            batch = self._grains[self._next : self._next + self._most]
            packed = self._packed[: len(batch) * self._size]
            self._pack(self._next, batch, packed)
            self._ready = packed.data
            self._next += len(batch)
        sent = sock.send(self._ready, socket.MSG_NOSIGNAL)
        self.left -= sent
        self._ready = self._ready[sent:]
        return sent

    def drop(self) -> None:
        """Pass all that is left and let go of the memory, which could not be unmapped otherwise."""
        self.left, self._pack, self._ready = 0, None, memoryview(b"")


def as_stored(pool: PoolGrains) -> Packer:
    """Grains as they lie in the pool."""
    return lambda _, grains, packed: pool.gather(grains, packed)


def sealed_bytes(grid: Grid, dtype: str) -> int:
    """Of one grain in 8 bits, with its seal."""
    return coded_bytes(grid, dtype) + SEAL_BYTES


class SealedInt8:
    """A packer of grains in 8 bits, each with its seal behind it. `checksums` are those of the whole reply's grains as
    they were offered, or 0."""

    def __init__(
        self, pool: PoolGrains, grid: Grid, codec: Int8Codec, *, checksums: Sequence[int], key: bytes, job: int
    ) -> None:
        self._pool = pool
        self._grid = grid
        self._codec = codec
        self._checksums = checksums
        self._key = key
        self._job = job
        self._stored: Bytes = np.empty(grid.grain_bytes, dtype=np.uint8)

    def __call__(self, before: int, grains: Sequence[int], packed: Bytes) -> None:
        for index, (grain, row) in enumerate(zip(grains, packed.reshape(len(grains), -1), strict=True), start=before):
            self._pool.gather((grain,), self._stored)
            expected = self._checksums[index]
            if expected and xxhash.xxh3_64_intdigest(self._stored.data) != expected:
                raise GrainChanged(f"grain {grain} is not what was offered any more")
            coded = row[:-SEAL_BYTES]
            self._codec.encode(self._grid, self._stored, coded)
            tag = seal(self._key, job=self._job, index=index, coded=coded.data)
            row[-SEAL_BYTES:] = np.frombuffer(tag, dtype=np.uint8)
