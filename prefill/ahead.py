"""Which open rooms go into the engine now: computing ahead of decode's reservations is limited to a share of the pool.

Without the limit, KV that nobody can take yet could fill prefill's pool while the rooms decode has reserved pages for
wait behind it, and each side would wait for the other until a lease ends.
"""

from __future__ import annotations

from prefill.rooms import PrefillRoom
from protocol.rooms import Room


class AheadLimit:
    """Waiting rooms by priority and arrival, and the pages that rooms not yet reserved hold in the engine.

    A room that does not fit never stops one behind it that does, until it has waited for `ageing_s`; from then on rooms
    that came later and are not reserved either wait for it. A room larger than the whole share waits for its
    reservation and stops nobody; one larger than the pool goes to the engine at once, which says so.
    """

    def __init__(self, *, share: float, pool_pages: int, ageing_s: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"ahead_share is {share}; it is a part of the pool, so from 0 to 1")
        self._max_pages = int(share * pool_pages)
        self._pool_pages = pool_pages
        self._ageing_s = ageing_s
        self._waiting: dict[Room, PrefillRoom] = {}
        self._ahead: dict[Room, int] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_pages(self) -> int:
        """Pages that rooms in the engine hold ahead of their reservations."""
        return sum(self._ahead.values())

    def enter(self, record: PrefillRoom) -> None:
        """A room was opened."""
        self._waiting[record.room] = record

    def leave(self, record: PrefillRoom) -> None:
        """A room has ended."""
        self._waiting.pop(record.room, None)
        self._ahead.pop(record.room, None)

    def reserved(self, record: PrefillRoom) -> None:
        """Decode has pages for this room: it counts no longer."""
        self._ahead.pop(record.room, None)

    def take(self, *, now: float) -> list[PrefillRoom]:
        """The rooms to put into the engine now; they wait no more."""
        taken: list[PrefillRoom] = []
        pages, blocked = self.num_pages, False
        for record in sorted(self._waiting.values(), key=lambda record: record.request.age_key):
            if not record.waits_for_reservation or record.num_pages > self._pool_pages:
                taken.append(record)
            elif not blocked and pages + record.num_pages <= self._max_pages:
                taken.append(record)
                pages += record.num_pages
                self._ahead[record.room] = record.num_pages
            elif record.num_pages <= self._max_pages and now - record.opened_at >= self._ageing_s:
                blocked = True
        for record in taken:
            del self._waiting[record.room]
        return taken
