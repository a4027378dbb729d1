"""The timelines of all rooms of one decode half: making them, their part in each step, and telling the router.

Rooms that nobody asked about have none and cost a look at that.
"""

from __future__ import annotations

from collections.abc import Callable

from decode.rooms import DecodeRoom
from decode.timeline import DecodeTimeline
from engine.request import RequestStatus
from protocol.phases import PhaseLog
from protocol.rooms import Message, Phases


class Timelines:
    """The callables are described at `DecodePorts`."""

    def __init__(
        self, *, clock: Callable[[], float], unix_time: Callable[[], float], send: Callable[[str, Message], None]
    ) -> None:
        self._clock = clock
        self._unix_time = unix_time
        self._send = send
        self._unstarted: list[DecodeRoom] = []
        """Those that generate from the start and wait for their first step."""
        self._ticked_at = 0.0

    def begin(self, record: DecodeRoom) -> None:
        """The room's router asked for a timeline."""
        log = PhaseLog(self._clock, self._unix_time)
        receives = record.address is not None
        record.timeline = DecodeTimeline(log, opened_at=record.opened_at, receives=receives)
        if not receives:
            self._unstarted.append(record)

    def ticked(self) -> None:
        """All is done that comes before a step."""
        self._ticked_at = self._clock()

    def stepped(self) -> None:
        """A step is over; some rooms may have begun in it."""
        if not self._unstarted:
            return
        for record in self._unstarted:
            if record.timeline is not None and record.request.status is not RequestStatus.WAITING:
                record.timeline.stepped(self._ticked_at)
        self._unstarted = [record for record in self._unstarted if record.request.status is RequestStatus.WAITING]

    def token(self, record: DecodeRoom) -> None:
        """A token of a room with a timeline is about to go to its router; what is to be told goes before the last."""
        assert record.timeline is not None
        assert record.output is not None
        last = record.output.finish is not None
        record.timeline.sampled(self._ticked_at, self._clock(), last=last)
        if last:
            self.tell(record)

    def tell(self, record: DecodeRoom) -> None:
        """Send the router what it has not heard, if it asked."""
        phases = record.timeline.take() if record.timeline is not None else []
        if phases:
            self._send(record.router, Phases(record.room, phases))
