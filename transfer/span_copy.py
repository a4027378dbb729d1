"""Copies lists of byte spans from one memory into another without a Python step per span.

Use: make a `SpanCopier` once (it loads, or on a machine's first start compiles, a small library); describe what is to
be moved as `Spans`; give it to `SpanCopier.copy` piece by piece:

    spans = Spans.of_pages(job.source_pages, job.target_pages, page_bytes)     # or Spans.of(sources, targets, lengths)
    for piece in spans.cut(4 << 20):
        if stop_requested: ...
        copier.copy(target, source, piece, streaming=...)

Other Python threads run while `copy` copies. A call cannot be ended before its end: a few megabytes, well under a
millisecond, are a good size, and the caller decides between two of them whether to go on. Spans may have any offset and
length; they are quickest where target and length are multiples of 64 bytes. Where no compiler is, the same is done span
by span in Python: slower for small spans, equal for large ones.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
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
        """One span per page, in the order of the lists."""
        sources = np.asarray(source_pages, dtype=np.int64) * page_bytes
        targets = np.asarray(target_pages, dtype=np.int64) * page_bytes
        if len(sources) != len(targets):
            raise ValueError(f"{len(sources)} source pages for {len(targets)} target pages")
        return Spans(sources=sources, targets=targets, lengths=np.full(len(sources), page_bytes, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return int(self.lengths.sum())

    def cut(self, max_bytes: int) -> Iterator[Spans]:
        """All of it in pieces of `max_bytes` bytes, the last one shorter; spans are cut in two where they must be."""
        ends = np.cumsum(self.lengths)
        total = int(ends[-1]) if len(ends) else 0
        if total <= max_bytes:
            yield from [self] if total else []
            return
        for start in range(0, total, max_bytes):
            stop = min(start + max_bytes, total)
            first = int(np.searchsorted(ends, start, side="right"))
            beyond = int(np.searchsorted(ends, stop, side="left")) + 1
            piece = Spans(
                sources=self.sources[first:beyond].copy(),
                targets=self.targets[first:beyond].copy(),
                lengths=self.lengths[first:beyond].copy(),
            )
            skipped = start - int(ends[first] - self.lengths[first])
            piece.sources[0] += skipped
            piece.targets[0] += skipped
            piece.lengths[0] -= skipped
            piece.lengths[-1] -= int(ends[beyond - 1]) - stop
            yield piece


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
            self._library.pd_copy_spans.argtypes = (_PTR, _I64, _PTR, _I64, _PTR, _PTR, _PTR, _I64, ctypes.c_int)
            self._library.pd_copy_spans.restype = _I64

    @property
    def is_native(self) -> bool:
        return self._library is not None

    def copy(self, target: Bytes, source: Bytes, spans: Spans, *, streaming: bool) -> None:
        """Copy all of `spans`, in no particular order; the memories do not overlap.

        `streaming` writes past the caches, which is twice as quick for much data that nobody reads soon; without it the
        bytes are in the cache afterwards, for instance to be hashed. Raises `ValueError` for a span that is not inside
        both memories, before anything is copied.
        """
        if self._library is None:
            _copy_in_python(target, source, spans)
            return
        assert target.flags.writeable
        assert target.flags.c_contiguous
        assert source.flags.c_contiguous
        wrong = self._library.pd_copy_spans(
            target.ctypes.data,
            target.nbytes,
            source.ctypes.data,
            source.nbytes,
            spans.targets.ctypes.data,
            spans.sources.ctypes.data,
            spans.lengths.ctypes.data,
            len(spans),
            streaming,
        )
        if wrong >= 0:
            raise _outside(target, source, spans, wrong)


def _copy_in_python(target: Bytes, source: Bytes, spans: Spans) -> None:
    listed = list(zip(spans.targets.tolist(), spans.sources.tolist(), spans.lengths.tolist(), strict=True))
    for index, (to, start, length) in enumerate(listed):
        if min(to, start, length) < 0 or to + length > target.nbytes or start + length > source.nbytes:
            raise _outside(target, source, spans, index)
    for to, start, length in listed:
        target[to : to + length] = source[start : start + length]


def _outside(target: Bytes, source: Bytes, spans: Spans, index: int) -> ValueError:
    return ValueError(
        f"span {index}, {spans.lengths[index]} bytes from {spans.sources[index]} to {spans.targets[index]}, is not "
        f"inside a source of {source.nbytes} and a target of {target.nbytes} bytes"
    )
