"""Who gets pages next: the rooms that wait for them, and the reservations that may be taken back.

Rooms whose KV is already computed come first, because it occupies prefill's pool until they take it; the others by age.
A room that does not fit never stops one that does, until it has waited for `ageing_s`: then all that come after it in
this order wait for it. A reservation whose copies stand still for `lease_s` is taken back when a computed room waits,
so that pages held for KV that does not come cannot keep out KV that is there.
"""

from __future__ import annotations

from collections.abc import Iterable

from decode.rooms import DecodeRoom
from decode.table import DecodeState
from protocol.rooms import Room


class GrantQueue:
    """Queued rooms by priority and arrival. Reads no clock; a pass over it is worth trying when `is_due`."""

    def __init__(self, *, lease_s: float, ageing_s: float, retry_s: float) -> None:
        self._lease_s = lease_s
        self._ageing_s = ageing_s
        self._retry_s = retry_s
        self._waiting: dict[Room, DecodeRoom] = {}
        self._changed = False
        self._tried_at = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, record: DecodeRoom) -> None:
        """A room wants pages."""
        self._waiting[record.room] = record
        self._changed = True

    def leave(self, record: DecodeRoom) -> None:
        """A room got its pages, or has ended."""
        self._waiting.pop(record.room, None)

    def changed(self) -> None:
        """Pages may have become free, or a room computed: the next pass may succeed."""
        self._changed = True

    def is_due(self, now: float) -> bool:
        """Whether to try. Besides changes seen here others free pages too, so it is tried again every `retry_s`."""
        return bool(self._waiting) and (self._changed or now - self._tried_at >= self._retry_s)

    def begin_pass(self, now: float) -> list[DecodeRoom]:
        """The rooms to try, in order."""
        self._changed = False
        self._tried_at = now
        return sorted(
            self._waiting.values(),
            key=lambda record: (
                record.handoff is None,
                not self.is_aged(record, now),
                -record.request.priority,
                record.queued_at,
            ),
        )

    def is_aged(self, record: DecodeRoom, now: float) -> bool:
        """Whether others must wait for this room."""
        return now - record.queued_at >= self._ageing_s

    @property
    def has_computed(self) -> bool:
        """Whether a room waits whose KV is ready to be taken."""
        return any(record.handoff is not None for record in self._waiting.values())

    def revocable(self, rooms: Iterable[DecodeRoom], now: float) -> list[DecodeRoom]:
        """Reservations that may be taken back now, the longest still first: no copy of theirs is running."""
        still = [
            record
            for record in rooms
            if record.state is DecodeState.RECEIVING and not record.jobs and now - record.progress_at >= self._lease_s
        ]
        return sorted(still, key=lambda record: record.progress_at)

    def next_deadline(self) -> float | None:
        """When a pass is next worth trying, if nothing else happens; leases are looked at in every pass."""
        if not self._waiting:
            return None
        return self._tried_at if self._changed else self._tried_at + self._retry_s
