"""Pages of a copy on their way into our pool out of memory that is at hand: a peer's, or a buffer of our own."""

from __future__ import annotations

from transfer.jobs import PageCopy
from transfer.landing import Landing
from transfer.span_copy import Bytes, SpanCopier, Spans
from transfer.spans import Pages

_VERIFIED_BLOCK_BYTES = 256 << 10
_PLAIN_BLOCK_BYTES = 4 << 20
_STREAMED_BYTES = 4 << 20
"""Copies of so many bytes would drive all else out of the caches."""


class PageRun:
    """The next pages of `copy` are the pages `pages` of `source`. `step` moves a block of them; between two steps the
    caller may give it up. It refers to `source` until it goes.

    Where pages are verified, blocks are small, so that each is hashed while it is still in the cache. Where many are
    not, they are written past the caches: nobody reads them before the whole prompt is there.
    """

    def __init__(self, landing: Landing, copy: PageCopy, source: Bytes, pages: Pages, *, transport: str) -> None:
        size, first, last = copy.page_bytes, copy.done_pages, copy.done_pages + len(pages)
        verified = any(copy.job.checksums[first:last])
        spans = Spans.of_pages(pages, copy.targets[first:last], size)
        streaming = not verified and copy.total_bytes >= _STREAMED_BYTES
        self._landing = landing
        self._copy = copy
        self._transport = transport
        self._block_bytes = size * max(1, (_VERIFIED_BLOCK_BYTES if verified else _PLAIN_BLOCK_BYTES) // size)
        self._run = SpanCopier().begin(landing.bytes, source, spans, streaming=streaming)

    @property
    def left(self) -> int:
        """Bytes not moved yet."""
        return self._run.left

    def step(self) -> None:
        """Move the next block and verify it. Raises `LandingError`, and `InjectedFault` when a test says so."""
        self._landing.before(self._copy, self._transport)
        moved = self._run.advance(self._block_bytes)
        self._landing.landed(self._copy, self._transport, moved // self._copy.page_bytes)
