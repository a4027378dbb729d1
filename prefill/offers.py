"""Offers: which computed pages of a room its decode half has not been told of yet, and telling it.

A page is offered when it is complete: whole pages while the prompt is being computed, the last one, which may be
part-filled, once the first token is sampled. Its checksum is computed at that moment, on the engine thread. Requests
are collected and sent once per pass, so that a `Join` and a `Reservation` that arrive together cost one offer, and
pages that decode holds are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prefill.rooms import PrefillRoom
from prefill.table import PrefillState
from protocol.rooms import Message, Offer, Room


class Offers:
    """The offers that are due in this pass. `checksums` may give nothing: then they are offered unverified."""

    def __init__(
        self,
        *,
        page_size: int,
        checksums: Callable[[Sequence[int], int], list[int]],
        send: Callable[[str, Message], None],
    ) -> None:
        self._page_size = page_size
        self._checksums = checksums
        self._send = send
        self._due: dict[Room, PrefillRoom] = {}

    def add(self, record: PrefillRoom) -> None:
        """Something may be there to offer."""
        if record.decode is not None:
            self._due[record.room] = record

    def drop(self, record: PrefillRoom) -> None:
        """The room has ended."""
        self._due.pop(record.room, None)

    def send_due(self) -> int:
        """Send all that is due; returns the number of pages offered."""
        if not self._due:
            return 0
        pages = sum(self._offer(record) for record in self._due.values())
        self._due.clear()
        return pages

    def _offer(self, record: PrefillRoom) -> int:
        assert record.decode is not None
        if record.state is PrefillState.RETAINED:
            complete = record.num_pages
        else:
            complete = record.request.num_computed // self._page_size
        first = record.held_pages
        if record.offered:
            spans = [range(first, record.offered.start), range(record.offered.stop, complete)]
            record.offered = range(min(first, record.offered.start), max(complete, record.offered.stop))
        else:
            spans = [range(first, complete)]
            record.offered = spans[0]
        for span in spans:
            if span:
                pages = record.request.pages[span.start : span.stop]
                self._send(record.decode, Offer(record.room, span.start, pages, self._checksums(pages, record.grain)))
        return sum(len(span) for span in spans)
