"""How the pages of a piece travel: as messages, which both sides derive alike from the lengths of the piece's runs.

A long run is a message of its own; short ones share one, as a message costs more than the copy of its pages. Where all
pages of a message are adjacent in a side's pool it is sent from there, or received right there. Where they are not it
passes through one of a few buffers, small enough to stay in the cache from one copy to the next.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from transfer.span_copy import Bytes, PackedRun, SpanCopier
from transfer.spans import Runs

LONG_BYTES = 256 << 10
SHARED_BYTES = 1 << 20
"""Short runs are joined up to this."""


def messages(counts: Sequence[int], page_bytes: int) -> list[slice]:
    """Which of some runs, of `counts` pages each, share a message, in order."""
    found: list[slice] = []
    begin = size = 0
    for index, count in enumerate(counts):
        nbytes = count * page_bytes
        is_long = nbytes >= LONG_BYTES
        if index > begin and (is_long or size + nbytes > SHARED_BYTES):
            found.append(slice(begin, index))
            begin, size = index, 0
        size += nbytes
        if is_long:
            found.append(slice(begin, index + 1))
            begin, size = index + 1, 0
    if begin < len(counts):
        found.append(slice(begin, len(counts)))
    return found


class Parts:
    """A side's pool, uint8 [bytes], and its `num_buffers` buffers, which are used in turn: at most so many messages may
    be under way at a time."""

    def __init__(self, pool: Bytes, page_bytes: int, *, num_buffers: int) -> None:
        self._pool = pool
        self._tensor = _tensor(pool)
        self._page_bytes = page_bytes
        self._buffers = np.empty((num_buffers, SHARED_BYTES), dtype=np.uint8)
        self._next = itertools.cycle(range(num_buffers))
        self._copier = SpanCopier()

    def outgoing(self, runs: Runs) -> torch.Tensor:
        """The bytes of a message of these pages."""
        if _adjacent(runs):
            return self._in_pool(runs)
        offsets, lengths = np.ascontiguousarray(runs.T * self._page_bytes)
        packed = self._buffer(int(lengths.sum()))
        run = self._copier.gather(self._pool, offsets, lengths, into=packed)
        run.advance(run.left)
        return torch.from_numpy(packed)

    def incoming(self, runs: Runs) -> tuple[torch.Tensor, PackedRun | None]:
        """Where to receive a message of these pages, and what then puts them in their places."""
        if _adjacent(runs):
            return self._in_pool(runs), None
        offsets, lengths = np.ascontiguousarray(runs.T * self._page_bytes)
        packed = self._buffer(int(lengths.sum()))
        run = self._copier.scatter(self._pool, offsets, lengths, out_of=packed)
        return torch.from_numpy(packed), run

    def _in_pool(self, runs: Runs) -> torch.Tensor:
        begin, count = int(runs[0, 0]), int(runs[:, 1].sum())
        return self._tensor[begin * self._page_bytes : (begin + count) * self._page_bytes]

    def _buffer(self, nbytes: int) -> Bytes:
        buffer: Bytes = self._buffers[next(self._next)][:nbytes]
        return buffer


def _adjacent(runs: Runs) -> bool:
    return bool((runs[:-1].sum(axis=1) == runs[1:, 0]).all())


def _tensor(pool: Bytes) -> torch.Tensor:
    """The same memory. That of a giver is read-only, of which torch would warn; nobody writes to it there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(pool)
