"""What a half knows of rooms beyond the live ones it holds: which ended, which must not begin, which are older than the
newest epoch it has heard of, and what came too early. Bounded in number and in time.

Both halves own one each. The clock is given; nothing here sends anything.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from protocol.parking import Parking
from protocol.rooms import AbortReason, Room
from protocol.tombstones import Tombstone, Tombstones


@dataclass(frozen=True, kw_only=True)
class MemoryLimits:
    """Bounds of what is remembered."""

    max_tombstones: int = 65536
    grace_s: float = 60.0
    """How long a room that ended is remembered after its deadline: messages about it may still be on their way."""
    tombstone_s: float = 600.0
    """How long an abort is remembered whose room's deadline is not known."""
    max_parked: int = 4096
    """Messages."""
    parked_s: float = 10.0


class Fate(enum.Enum):
    """What is known of a room that is not live here."""

    UNKNOWN = "unknown"
    ENDED = "ended"
    BARRED = "barred"
    """Aborted before its open came."""
    STALE = "stale"
    """A newer epoch of its request is known."""


class RoomMemory:
    """Tombstones, parked messages, and the newest live epoch of each request."""

    def __init__(self, *, clock: Callable[[], float], limits: MemoryLimits) -> None:
        self._clock = clock
        self._limits = limits
        self._live: dict[str, int] = {}
        self.parking = Parking(limit=limits.max_parked, seconds=limits.parked_s)
        self.tombstones = Tombstones(limit=limits.max_tombstones)

    def fate(self, room: Room) -> Fate:
        """What became of `room`, which is not live."""
        live = self._live.get(room.request_id, -1)
        waiting = self.parking.waiting(room.request_id)
        if live > room.epoch or (waiting is not None and waiting.epoch > room.epoch):
            return Fate.STALE
        stone = self.tombstone(room)
        if stone is None or stone.epoch < room.epoch:
            return Fate.UNKNOWN
        if stone.epoch > room.epoch:
            return Fate.STALE
        return Fate.ENDED if stone.lived else Fate.BARRED

    def tombstone(self, room: Room) -> Tombstone | None:
        """The tombstone of the newest ended epoch of the room's request."""
        return self.tombstones.find(room.request_id, now=self._clock())

    def knows(self, room: Room) -> bool:
        """Whether anything is remembered of `room`."""
        return self.fate(room) is not Fate.UNKNOWN or self.parking.waiting(room.request_id) == room

    def live_older_than(self, room: Room) -> Room | None:
        """The live room of an older epoch of the same request."""
        epoch = self._live.get(room.request_id)
        return Room(room.request_id, epoch) if epoch is not None and epoch < room.epoch else None

    def parked_older_than(self, room: Room) -> Room | None:
        """The room of an older epoch of the same request that messages are parked for."""
        waiting = self.parking.waiting(room.request_id)
        return waiting if waiting is not None and waiting.epoch < room.epoch else None

    def begin(self, room: Room) -> None:
        """`room` is live now."""
        self._live[room.request_id] = room.epoch

    def end(self, room: Room, *, reason: AbortReason | None, deadline: float | None, lived: bool = True) -> None:
        """`room` has ended, or with `lived` False is not to begin; a tombstone stays past its deadline, if known."""
        if self._live.get(room.request_id) == room.epoch:
            del self._live[room.request_id]
        now = self._clock()
        until = now + self._limits.tombstone_s if deadline is None else max(now, deadline) + self._limits.grace_s
        self.tombstones.purge(now=now)
        self.tombstones.bury(room, reason=reason, lived=lived, until=until, now=now)
