"""Copies lists of byte spans from one memory into another without a Python step per span.

Use: make a `SpanCopier` once (it loads, or on a machine's first start compiles, a small library); describe what is to
be moved as `Spans`; copy it piece by piece:

    spans = Spans.of_pages(job.source_pages, job.target_pages, page_bytes)     # or Spans.of(sources, targets, lengths)
    run = copier.begin(target, source, spans, streaming=...)
    while run.left:
        if stop_requested: ...
        moved = run.advance(4 << 20)

Other Python threads run while `advance` copies. It cannot be ended before its end: a few megabytes, well under a
millisecond, are a good size, and the caller decides between two calls whether to go on. Spans may have any offset and
length; they are quickest where target and length are multiples of 64 bytes. Where no compiler is, the same is done span
by span in Python: slower for small spans, equal for large ones.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transfer.native import NativeUnavailable, load_library

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]

_I64, _PTR = ctypes.c_int64, ctypes.c_void_p


@dataclass(frozen=True, kw_only=True, eq=False)
class Spans:
    """`lengths[i]` bytes at `sources[i]` of one memory go to `targets[i]` of another, for every i; int64 [spans],
    contiguous."""

    sources: Numbers
    targets: Numbers
    lengths: Numbers

    @staticmethod
    def of(sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int]) -> Spans:
        """Raises `ValueError` for lists of unequal length."""
        arrays = [np.ascontiguousarray(numbers, dtype=np.int64) for numbers in (sources, targets, lengths)]
        if not len(arrays[0]) == len(arrays[1]) == len(arrays[2]):
            raise ValueError(f"{len(sources)} sources, {len(targets)} targets and {len(lengths)} lengths of spans")
        return Spans(sources=arrays[0], targets=arrays[1], lengths=arrays[2])

    @staticmethod
    def of_pages(source_pages: Sequence[int], target_pages: Sequence[int], page_bytes: int) -> Spans:
        """One span per page, in the order of the lists. Raises `ValueError` for lists of unequal length."""
        sources = np.asarray(source_pages, dtype=np.int64) * page_bytes
        targets = np.asarray(target_pages, dtype=np.int64) * page_bytes
        if len(sources) != len(targets):
            raise ValueError(f"{len(sources)} source pages for {len(targets)} target pages")
        return Spans(sources=sources, targets=targets, lengths=np.full(len(sources), page_bytes, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return int(self.lengths.sum())


class SpanRun:
    """`spans` on their way, made by `SpanCopier.begin`. Refers to both memories until it goes; one thread at a time."""

    def __init__(
        self, library: ctypes.CDLL | None, target: Bytes, source: Bytes, spans: Spans, *, streaming: bool
    ) -> None:
        assert target.flags.writeable
        assert target.flags.c_contiguous
        assert source.flags.c_contiguous
        self.left = spans.nbytes
        """Bytes not copied yet."""
        self._memories = (target, source)
        self._spans = spans
        self._place = (_I64 * 2)()  # the next span, and the next byte in it
        self._native = None if library is None else library.pd_copy_spans
        tables = [array.ctypes.data for array in (spans.targets, spans.sources, spans.lengths)]
        count = len(spans.lengths)
        wrong = _first_outside(library, target.nbytes, source.nbytes, spans, tables)
        if wrong >= 0:
            raise ValueError(
                f"span {wrong}, {spans.lengths[wrong]} bytes from {spans.sources[wrong]} to {spans.targets[wrong]}, "
                f"is not inside a source of {source.nbytes} and a target of {target.nbytes} bytes"
            )
        self._arguments = (target.ctypes.data, source.ctypes.data, *tables, count, self._place, streaming)

    def advance(self, max_bytes: int) -> int:
        """Copy the next `max_bytes` bytes, in the order of the spans, or what is left; how many that were."""
        if self._native is not None:
            moved = int(self._native(*self._arguments, max_bytes))
        else:
            moved = self._advance_in_python(max_bytes)
        self.left -= moved
        return moved

    def _advance_in_python(self, max_bytes: int) -> int:
        (target, source), spans, room = self._memories, self._spans, max_bytes
        index, at = self._place
        while index < len(spans.lengths) and room > 0:
            start, to = int(spans.sources[index]) + at, int(spans.targets[index]) + at
            count = min(int(spans.lengths[index]) - at, room)
            target[to : to + count] = source[start : start + count]
            room, at = room - count, at + count
            if at == spans.lengths[index]:
                index, at = index + 1, 0
        self._place[0], self._place[1] = index, at
        return max_bytes - room


class SpanCopier:
    """Has no state but the library; may be used by any number of threads. `native=False` does without the library."""

    def __init__(self, *, native: bool = True) -> None:
        self._library: ctypes.CDLL | None = None
        if native:
            try:
                self._library = load_library("span_copy")
            except NativeUnavailable as error:
                logger.warning("spans are copied by Python, which is slower for small ones: %s", error)
        if self._library is not None:
            tables = (_PTR, _PTR, _PTR, _I64)
            self._library.pd_check_spans.argtypes = (_I64, _I64, *tables)
            self._library.pd_check_spans.restype = _I64
            self._library.pd_copy_spans.argtypes = (_PTR, _PTR, *tables, _PTR, ctypes.c_int, _I64)
            self._library.pd_copy_spans.restype = _I64

    @property
    def is_native(self) -> bool:
        return self._library is not None

    def begin(self, target: Bytes, source: Bytes, spans: Spans, *, streaming: bool) -> SpanRun:
        """Make ready to copy `spans`; the memories do not overlap.

        `streaming` writes past the caches, which is up to twice as quick for much data that nobody reads soon; without
        it the bytes are in the cache afterwards, for instance to be hashed. Raises `ValueError` for a span that is not
        inside both memories.
        """
        return SpanRun(self._library, target, source, spans, streaming=streaming)

    def copy(self, target: Bytes, source: Bytes, spans: Spans, *, streaming: bool) -> None:
        """Copy all of `spans` at once."""
        run = self.begin(target, source, spans, streaming=streaming)
        run.advance(run.left)


def _first_outside(
    library: ctypes.CDLL | None, target_bytes: int, source_bytes: int, spans: Spans, tables: list[int]
) -> int:
    """The first span that is not inside both memories; -1 when there is none."""
    if library is not None:
        return int(library.pd_check_spans(target_bytes, source_bytes, *tables, len(spans.lengths)))
    columns = (spans.targets.tolist(), spans.sources.tolist(), spans.lengths.tolist())
    for index, (to, start, length) in enumerate(zip(*columns, strict=True)):
        if min(to, start, length) < 0 or to + length > target_bytes or start + length > source_bytes:
            return index
    return -1
