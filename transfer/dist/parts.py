"""How the pages of a piece travel: as messages, which both sides derive alike from the lengths of the piece's runs.

A long run is a message of its own; short ones share one, as a message costs more than the copy of its pages. Where all
pages of a message are adjacent in a side's pool it is sent from there, or received right there. Where they are not it
passes through one of a few buffers, while the one before it is on its way.
"""

from __future__ import annotations

import itertools
import warnings
from typing import NamedTuple

import numpy as np
import torch

from transfer.span_copy import Bytes, Numbers, SpanCopier, SpanRun, Spans
from transfer.spans import Runs

LONG_BYTES = 256 << 10
SHARED_BYTES = 4 << 20
"""Short runs are joined up to this."""
_FIRST_BYTES = 512 << 10
"""But a piece's first ones to this, the next to twice as much and so on: nothing moves while they are packed."""


class Part(NamedTuple):
    """A message. Those of a piece that are packed are copied in their order."""

    memory: torch.Tensor
    """What is sent, or where it is received; uint8 [bytes]."""
    packing: SpanRun | None
    """Of all messages of the piece between pool and buffers; None for one that is in its place."""

    def copy(self) -> None:
        """Pack it, before it is sent; or unpack it, when it was received."""
        if self.packing is not None:
            self.packing.advance(self.memory.numel())


class Parts:
    """A side's pool, uint8 [bytes], and its `num_buffers` buffers, which are used in turn: at most so many messages may
    be under way at a time."""

    def __init__(self, pool: Bytes, page_bytes: int, *, num_buffers: int) -> None:
        self._pool = pool
        self._page_bytes = page_bytes
        self._buffers = np.empty(num_buffers * SHARED_BYTES, dtype=np.uint8)
        self._starts = itertools.cycle(range(0, num_buffers * SHARED_BYTES, SHARED_BYTES))
        self._pool_tensor, self._buffers_tensor = _tensor(pool), _tensor(self._buffers)
        self._copier = SpanCopier()

    def outgoing(self, runs: Runs) -> list[Part]:
        """The messages of a piece of these pages, to be sent."""
        cut = self._cut(runs)
        spans = Spans(sources=cut.in_pool, targets=cut.in_buffers, lengths=cut.lengths)
        return cut.parts(self._copier.begin(self._buffers, self._pool, spans, streaming=False))

    def incoming(self, runs: Runs, *, read_soon: bool) -> list[Part]:
        """The messages of a piece for these pages, to be received; they are unpacked past the caches, unless they are
        read soon."""
        cut = self._cut(runs)
        spans = Spans(sources=cut.in_buffers, targets=cut.in_pool, lengths=cut.lengths)
        return cut.parts(self._copier.begin(self._pool, self._buffers, spans, streaming=not read_soon))

    def _cut(self, runs: Runs) -> _Cut:
        offsets, lengths = np.ascontiguousarray(runs.T * self._page_bytes)
        apart = offsets[1:] != offsets[:-1] + lengths[:-1]
        packed, in_buffers = np.zeros(len(runs), dtype=np.bool_), np.zeros_like(offsets)
        memories: list[tuple[torch.Tensor, bool]] = []
        for message in messages(lengths):
            nbytes = int(lengths[message].sum())
            is_packed = bool(apart[message.start : message.stop - 1].any())
            memory, start = self._pool_tensor, int(offsets[message.start])
            if is_packed:
                memory, start = self._buffers_tensor, next(self._starts)
                packed[message] = True
                in_buffers[message] = start + lengths[message].cumsum() - lengths[message]
            memories.append((memory[start : start + nbytes], is_packed))
        return _Cut(memories, offsets[packed], in_buffers[packed], lengths[packed])


def messages(lengths: Numbers) -> list[slice]:
    """Which of some runs, of `lengths` bytes each, share a message, in order."""
    ends, found, begin, room = lengths.cumsum(), list[slice](), 0, _FIRST_BYTES
    for index in (*np.flatnonzero(lengths >= LONG_BYTES).tolist(), len(lengths)):
        while begin < index:
            before = int(ends[begin - 1]) if begin else 0
            end = min(int(np.searchsorted(ends, before + room, side="right")), index)
            found.append(slice(begin, end))
            begin, room = end, min(2 * room, SHARED_BYTES)
        if index < len(lengths):
            found.append(slice(index, index + 1))
            begin = index + 1
    return found


class _Cut(NamedTuple):
    """A piece as messages: where each is, and whether it is packed; how the pages of those lie, in order."""

    messages: list[tuple[torch.Tensor, bool]]
    in_pool: Numbers
    in_buffers: Numbers
    lengths: Numbers

    def parts(self, packing: SpanRun) -> list[Part]:
        return [Part(memory, packing if is_packed else None) for memory, is_packed in self.messages]


def _tensor(memory: Bytes) -> torch.Tensor:
    """The same memory. The pool of a giver is read-only, of which torch would warn; nobody writes to it there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(memory)
