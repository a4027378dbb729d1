"""How a half answers messages about rooms that are not live: early ones are parked, late ones told that it is over.

Both halves own one, over their `RoomMemory`; messages go out through `send`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from protocol.parking import Parked
from protocol.room_memory import RoomMemory
from protocol.rooms import Abort, AbortReason, Closed, FailureCode, Join, Message, Room, RoomFailed


@dataclass
class MessageCounters:
    """Messages that did not do what they usually do, since the half was made."""

    duplicates: int = 0
    stale_messages: int = 0
    """Of an older epoch or of a room that has ended: they changed nothing."""
    tombstone_hits: int = 0
    """Opens refused and joins turned away."""
    parked: int = 0
    dropped_parked: int = 0
    """Parked messages that were never taken: too many, too late, aborted, or their link was lost."""


class Answers:
    """Carries out the table's actions that need no live room."""

    def __init__(self, *, memory: RoomMemory, clock: Callable[[], float], send: Callable[[str, Message], None]) -> None:
        self._memory = memory
        self._clock = clock
        self._send = send
        self.counters = MessageCounters()

    def duplicate(self) -> None:
        self.counters.duplicates += 1

    def stale(self) -> None:
        self.counters.stale_messages += 1

    def park(self, room: Room, link: str, message: Message) -> None:
        """Keep an early message for its open; when there is no space, turn it away."""
        if self._memory.parking.park(room, link, message, now=self._clock()):
            self.counters.parked += 1
        else:
            self._turn_away(room, Parked(link, message), AbortReason.NEVER_OPENED)

    def refuse(self, room: Room, link: str) -> None:
        """An open came after the room's end."""
        self.counters.tombstone_hits += 1
        self._send(link, RoomFailed(room, FailureCode.REFUSED, "the room was aborted, or superseded, before it opened"))

    def closed(self, room: Room, link: str) -> None:
        """Acknowledge an abort: this half holds nothing of the room."""
        self._send(link, Closed(room))

    def too_late(self, room: Room, link: str) -> None:
        """A `Join` came after the room's end: say why it ended."""
        self.counters.tombstone_hits += 1
        stone = self._memory.tombstone(room)
        same = stone is not None and stone.epoch == room.epoch
        reason = stone.reason if stone is not None and same else AbortReason.SUPERSEDED
        self._send(link, Abort(room, reason or AbortReason.PEER_FAILED))

    def turn_away_parked(self, room: Room, reason: AbortReason, *, but: str = "") -> None:
        """The room will not open: tell those who have joined it, except the link `but`, which knows."""
        for parked in self._memory.parking.take(room.request_id):
            if parked.link == but:
                self.counters.dropped_parked += 1
            else:
                self._turn_away(room, parked, reason)

    def turn_away_overdue(self) -> None:
        """Parked messages whose open has not come in time."""
        while (room := self._memory.parking.overdue(now=self._clock())) is not None:
            self.turn_away_parked(room, AbortReason.NEVER_OPENED)

    def link_lost(self, link: str) -> None:
        """Whoever sent these parked messages cannot hear an answer."""
        self.counters.dropped_parked += self._memory.parking.drop_link(link)

    def _turn_away(self, room: Room, parked: Parked, reason: AbortReason) -> None:
        self.counters.dropped_parked += 1
        if isinstance(parked.message, Join):
            self._send(parked.link, Abort(room, reason))
