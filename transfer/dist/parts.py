"""How the pages of a piece travel: as messages, which both sides derive alike from the lengths of the piece's runs.

A long run is a message of its own; short ones share one, as a message costs more than the copy of its pages. Where all
pages of a message are adjacent in a side's pool it is sent from there, or received right there. Where they are not it
passes through one of a few buffers, small enough to stay in the cache from one copy to the next.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from transfer.span_copy import Bytes, Numbers, SpanCopier, SpanRun, Spans
from transfer.spans import Runs

LONG_BYTES = 256 << 10
SHARED_BYTES = 2 << 20
"""Short runs are joined up to this."""


class Part(NamedTuple):
    """A message, as places in a pool."""

    offsets: Numbers
    lengths: Numbers
    nbytes: int
    adjacent: bool


def messages(lengths: Sequence[int]) -> list[slice]:
    """Which of some runs, of `lengths` bytes each, share a message, in order."""
    found: list[slice] = []
    begin = size = 0
    for index, nbytes in enumerate(lengths):
        is_long = nbytes >= LONG_BYTES
        if index > begin and (is_long or size + nbytes > SHARED_BYTES):
            found.append(slice(begin, index))
            begin, size = index, 0
        size += nbytes
        if is_long:
            found.append(slice(begin, index + 1))
            begin, size = index + 1, 0
    if begin < len(lengths):
        found.append(slice(begin, len(lengths)))
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

    def cut(self, runs: Runs) -> list[Part]:
        """The messages of a piece of these pages."""
        offsets, lengths = np.ascontiguousarray(runs.T * self._page_bytes)
        if len(runs) == 1:
            return [Part(offsets, lengths, int(lengths[0]), adjacent=True)]
        joined = offsets[1:] == offsets[:-1] + lengths[:-1]
        return [
            Part(
                offsets[part],
                lengths[part],
                int(lengths[part].sum()),
                adjacent=bool(joined[part.start : part.stop - 1].all()),
            )
            for part in messages(lengths.tolist())
        ]

    def outgoing(self, part: Part) -> torch.Tensor:
        """The bytes of a message."""
        if part.adjacent:
            return self._in_pool(part)
        packed = self._buffers[next(self._next)][: part.nbytes]
        self._copier.gather(self._pool, part.offsets, part.lengths, into=packed).advance(part.nbytes)
        return torch.from_numpy(packed)

    def incoming(self, part: Part, *, read_soon: bool) -> tuple[torch.Tensor, SpanRun | None]:
        """Where to receive a message, and what then puts it in its places: past the caches, unless it is read soon."""
        if part.adjacent:
            return self._in_pool(part), None
        packed = self._buffers[next(self._next)][: part.nbytes]
        spans = Spans(sources=part.lengths.cumsum() - part.lengths, targets=part.offsets, lengths=part.lengths)
        return torch.from_numpy(packed), self._copier.begin(self._pool, packed, spans, streaming=not read_soon)

    def _in_pool(self, part: Part) -> torch.Tensor:
        begin = int(part.offsets[0])
        return self._tensor[begin : begin + part.nbytes]


def _tensor(pool: Bytes) -> torch.Tensor:
    """The same memory. That of a giver is read-only, of which torch would warn; nobody writes to it there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(pool)
