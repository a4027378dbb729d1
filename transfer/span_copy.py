"""Copies lists of byte spans from one memory into another without a Python step per span.

Use: make a `SpanCopier` once (it loads, or on a machine's first start compiles, a small library); describe what is to
be moved as `Spans`; copy it piece by piece:

    spans = Spans.of_pages(job.source_pages, job.target_pages, page_bytes)     # or Spans.of(sources, targets, lengths)
    run = copier.begin(target, source, spans, streaming=...)
    while run.left:
        if stop_requested: ...
        moved = run.advance(4 << 20)

Other Python threads run while `advance` copies. It cannot be ended before its end: a few megabytes, well under a
millisecond, are a good size, and the caller decides between two calls whether to go on. `gather` puts bytes one behind
the other into a buffer that is sent from, say. Spans may have any offset and length; they are quickest where target and
length are multiples of 64 bytes. Where no compiler is, the same is done span by span in Python: slower for small spans,
equal for large ones.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transfer.native import I64, INT, PTR, load_c

_FEW_SPANS = 16
"""So many are looked at sooner than C is called, which also gives the interpreter away meanwhile."""

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


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
    def of_pages(source_pages: npt.ArrayLike, target_pages: npt.ArrayLike, page_bytes: int) -> Spans:
        """One span per page, in the order of the lists. Raises `ValueError` for lists of unequal length."""
        sources = np.asarray(source_pages, dtype=np.int64) * page_bytes
        targets = np.asarray(target_pages, dtype=np.int64) * page_bytes
        if len(sources) != len(targets):
            raise ValueError(f"{len(sources)} source pages for {len(targets)} target pages")
        return Spans(sources=sources, targets=targets, lengths=np.full(len(sources), page_bytes, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return int(self.lengths.sum())


class _Place:
    """How far a list of spans has been copied. Refers to the memories until it goes; one thread at a time."""

    def __init__(self, lengths: Numbers) -> None:
        self.left = int(lengths.sum())
        """Bytes not copied yet."""
        self._lengths = lengths
        self._next = (I64 * 2)()  # span, and byte in it

    def _steps(self, max_bytes: int) -> Iterator[tuple[int, int, int]]:
        """The span, the byte in it and the number of bytes of each copy that makes up the next `max_bytes` bytes."""
        index, at = self._next
        while index < len(self._lengths) and max_bytes > 0:
            length = int(self._lengths[index])
            count = min(length - at, max_bytes)
            yield index, at, count
            max_bytes, at = max_bytes - count, at + count
            if at == length:
                index, at = index + 1, 0
        self._next[0], self._next[1] = index, at


class SpanRun(_Place):
    """`spans` on their way, made by `SpanCopier.begin`."""

    def __init__(
        self, library: ctypes.CDLL | None, target: Bytes, source: Bytes, spans: Spans, *, streaming: bool
    ) -> None:
        super().__init__(spans.lengths)
        assert target.flags.writeable
        _check(library, target, spans.targets, spans.lengths, "target")
        _check(library, source, spans.sources, spans.lengths, "source")
        self._library = library
        self._memories = (target, source)
        self._spans = spans
        addresses = (target, source, spans.targets, spans.sources, spans.lengths)
        self._arguments = (*(a.ctypes.data for a in addresses), len(spans.lengths), self._next, streaming)

    def advance(self, max_bytes: int) -> int:
        """Copy the next `max_bytes` bytes, in the order of the spans, or what is left; how many that were."""
        if self._library is not None:
            moved = int(self._library.pd_copy_spans(*self._arguments, max_bytes))
        else:
            (target, source), spans, moved = self._memories, self._spans, 0
            for index, at, count in self._steps(max_bytes):
                to, start = int(spans.targets[index]) + at, int(spans.sources[index]) + at
                target[to : to + count] = source[start : start + count]
                moved += count
        self.left -= moved
        return moved


class PackedRun(_Place):
    """The bytes of some spans of one memory, one behind the other in `packed`, as many at a time as fit: made by
    `SpanCopier.gather`."""

    def __init__(
        self, library: ctypes.CDLL | None, source: Bytes, offsets: Numbers, lengths: Numbers, packed: Bytes
    ) -> None:
        super().__init__(lengths)
        assert packed.flags.writeable
        assert packed.flags.c_contiguous
        _check(library, source, offsets, lengths, "source")
        self._library = library
        self._source = source
        self._offsets = offsets
        self._packed = packed
        addresses = (packed.ctypes.data, source.ctypes.data, None, offsets.ctypes.data, lengths.ctypes.data)
        self._arguments = (*addresses, len(lengths), self._next, False)

    def advance(self, max_bytes: int) -> int:
        """Gather the next `max_bytes` bytes, or what is left, into the beginning of `packed`; how many that were."""
        assert max_bytes <= self._packed.nbytes
        if self._library is not None:
            moved = int(self._library.pd_copy_spans(*self._arguments, max_bytes))
        else:
            moved = 0
            for index, at, count in self._steps(max_bytes):
                start = int(self._offsets[index]) + at
                self._packed[moved : moved + count] = self._source[start : start + count]
                moved += count
        self.left -= moved
        return moved


class SpanCopier:
    """Has no state but the library; may be used by any number of threads. `native=False` does without the library."""

    def __init__(self, *, native: bool = True) -> None:
        self._library = _library() if native else None

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

    def gather(self, source: Bytes, offsets: Numbers, lengths: Numbers, *, into: Bytes) -> PackedRun:
        """Make ready to pack these spans of `source`. Raises `ValueError` for one that is not inside."""
        return PackedRun(self._library, source, offsets, lengths, into)


@functools.cache  # a loaded library is its process's anyway
def _library() -> ctypes.CDLL | None:
    functions = {
        "pd_check_spans": (I64, (I64, PTR, PTR, I64)),
        "pd_copy_spans": (I64, (PTR, PTR, PTR, PTR, PTR, I64, PTR, INT, I64)),
    }
    return load_c("span_copy", functions, without="spans are copied by Python, which is slower for small ones")


def _check(library: ctypes.CDLL | None, memory: Bytes, offsets: Numbers, lengths: Numbers, whose: str) -> None:
    """Raises `ValueError` when a span is not inside `memory`."""
    assert memory.flags.c_contiguous
    count, wrong = len(lengths), -1
    if library is not None and count > _FEW_SPANS:
        wrong = int(library.pd_check_spans(memory.nbytes, offsets.ctypes.data, lengths.ctypes.data, count))
    else:
        pairs = zip(offsets.tolist(), lengths.tolist(), strict=True)
        outside = (i for i, (at, length) in enumerate(pairs) if min(at, length) < 0 or at + length > memory.nbytes)
        wrong = next(outside, -1)
    if wrong >= 0:
        raise ValueError(
            f"span {wrong} of {count}, {lengths[wrong]} bytes at {offsets[wrong]}, is not inside a {whose} of "
            f"{memory.nbytes} bytes"
        )
