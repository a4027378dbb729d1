"""What a half remembers of rooms that ended: bounded in number, and in time by the caller's clock."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from protocol.rooms import AbortReason, Room


@dataclass(frozen=True, slots=True)
class Tombstone:
    """One room that ended, or that must not begin."""

    epoch: int
    reason: AbortReason | None
    """None for a room that ended as it should."""
    lived: bool
    """False when the abort came before the open, which is then refused."""
    until: float


class Tombstones:
    """The newest ended epoch of each request, `limit` of them at most: the oldest go first."""

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._stones: OrderedDict[str, Tombstone] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stones)

    def bury(self, room: Room, *, reason: AbortReason | None, lived: bool, until: float, now: float) -> None:
        """Remember that `room` has ended. Nothing changes when a newer epoch of it has ended already."""
        known = self.find(room.request_id, now=now)
        if known is not None and known.epoch > room.epoch:
            return
        self._stones[room.request_id] = Tombstone(room.epoch, reason, lived, until)
        self._stones.move_to_end(room.request_id)
        while len(self._stones) > self._limit:
            self._stones.popitem(last=False)

    def find(self, request_id: str, *, now: float) -> Tombstone | None:
        """The tombstone of the request's newest ended epoch, unless its time is over."""
        stone = self._stones.get(request_id)
        if stone is not None and stone.until <= now:
            del self._stones[request_id]
            return None
        return stone

    def purge(self, *, now: float) -> None:
        """Drop tombstones from the oldest on while their time is over; a younger one that is over waits for `find`."""
        while self._stones and next(iter(self._stones.values())).until <= now:
            self._stones.popitem(last=False)
