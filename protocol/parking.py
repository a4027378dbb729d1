"""Messages that came before their room was open. Bounded in number and in time, by the caller's clock.

Only one epoch of a request can be waiting: the half closes an older one before it parks for a newer.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from protocol.rooms import Message, Room


@dataclass(frozen=True, slots=True)
class Parked:
    """One early message and the link it came over."""

    link: str
    message: Message


@dataclass(slots=True)
class _Spot:
    room: Room
    until: float
    parked: list[Parked]


class Parking:
    """Early messages by request, `limit` of them at most; those of one room wait together, `seconds` from the first."""

    def __init__(self, *, limit: int, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._spots: OrderedDict[str, _Spot] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def park(self, room: Room, link: str, message: Message, *, now: float) -> bool:
        """Keep `message` for the open of `room`; False when the parking is full."""
        if self._count >= self._limit:
            return False
        spot = self._spots.setdefault(room.request_id, _Spot(room, now + self._seconds, []))
        assert spot.room == room, f"{room} is to be parked while {spot.room} is"
        spot.parked.append(Parked(link, message))
        self._count += 1
        return True

    def waiting(self, request_id: str) -> Room | None:
        """The room of the request that messages are parked for."""
        spot = self._spots.get(request_id)
        return None if spot is None else spot.room

    def take(self, request_id: str) -> list[Parked]:
        """What was parked for the request, in order of arrival; it is parked no more."""
        spot = self._spots.pop(request_id, None)
        if spot is None:
            return []
        self._count -= len(spot.parked)
        return spot.parked

    def drop_link(self, link: str) -> int:
        """Forget everything that came over a link that is lost; returns how many messages that were."""
        before = self._count
        for request_id, spot in list(self._spots.items()):
            kept = [parked for parked in spot.parked if parked.link != link]
            self._count -= len(spot.parked) - len(kept)
            spot.parked = kept
            if not kept:
                del self._spots[request_id]
        return before - self._count

    def overdue(self, *, now: float) -> Room | None:
        """A room whose first parked message has waited too long."""
        spot = next(iter(self._spots.values()), None)
        return spot.room if spot is not None and spot.until <= now else None

    def next_deadline(self) -> float | None:
        """When the next room will be overdue."""
        spot = next(iter(self._spots.values()), None)
        return None if spot is None else spot.until
