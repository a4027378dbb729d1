"""The prefill half of every room on one replica: compute, send the first token, offer the pages, hold them until taken.

Lifecycle of a room: `OpenPrefill` makes it; it enters the engine at once or, when it would compute too far ahead of
decode's reservation, later (`prefill/ahead.py`). After each step its newly computed pages are offered to the decode
half that joined (`prefill/offers.py`). Its first token goes to the router, the handoff to decode; the pages stay until
`Delivered`, the end of the lease, or any of the ways in which a room ends early. What happens in which state is
`PREFILL_TABLE` (`prefill/table.py`).

Everything here runs on the engine thread. It opens no socket and never waits: messages go out through `send` and
`emit`, time comes from `clock`. The owner calls `handle` and `link_lost` for what arrives, then `tick`, then
`after_step` with what the engine did, and sleeps no longer than `next_deadline`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from engine.limits import RequestTooLong
from engine.outputs import StepOutput, TokenOutput
from engine.request import Request
from prefill.actions import PrefillActions
from prefill.ahead import AheadLimit
from prefill.counters import PrefillCounters, PrefillStage
from prefill.ports import PrefillPorts
from prefill.rooms import PrefillRoom
from prefill.table import PREFILL_ENDINGS, PREFILL_TABLE, PrefillEvent, PrefillState
from protocol.cause import Cause
from protocol.room_memory import Fate, MemoryLimits, RoomMemory
from protocol.rooms import (
    Abort,
    AbortReason,
    Closed,
    Delivered,
    Join,
    Message,
    OpenPrefill,
    Reservation,
    Room,
)

PrefillMessage = OpenPrefill | Join | Reservation | Delivered | Abort | Closed

_FATES = {
    Fate.UNKNOWN: PrefillState.ABSENT,
    Fate.ENDED: PrefillState.ENDED,
    Fate.BARRED: PrefillState.BARRED,
    Fate.STALE: PrefillState.STALE,
}


class PrefillHalf:
    """All prefill halves over one engine.

    `ahead_share` is the part of the pool that rooms may fill before decode has reserved pages for them, `ageing_s` how
    long a room waits for its share before later ones wait for it, `lease_s` how long computed pages wait for decode.
    """

    def __init__(
        self,
        ports: PrefillPorts,
        *,
        lease_s: float = 120.0,
        ahead_share: float = 0.5,
        ageing_s: float = 5.0,
        limits: MemoryLimits | None = None,
    ) -> None:
        self._engine = ports.engine
        self._clock = ports.clock
        self._observe = ports.observe
        self._table = PREFILL_TABLE
        self._memory = RoomMemory(clock=ports.clock, limits=limits or MemoryLimits())
        self._ahead = AheadLimit(share=ahead_share, pool_pages=ports.engine.config.num_pages, ageing_s=ageing_s)
        self._actions = PrefillActions(ports, memory=self._memory, ahead=self._ahead, lease_s=lease_s)
        self._draining = False
        self._ticked_at = 0.0
        """When the last `tick` ended, and with it all that comes before a step."""

    # ---- what the owner calls -------------------------------------------------------------------------------

    @property
    def rooms(self) -> Mapping[Room, PrefillRoom]:
        """The live rooms."""
        return self._actions.rooms

    @property
    def idle(self) -> bool:
        return not self._actions.rooms

    @property
    def counters(self) -> PrefillCounters:
        return self._actions.counters

    @property
    def num_waiting(self) -> int:
        """Open rooms that are not let into the engine yet."""
        return self._ahead.num_waiting

    def knows(self, room: Room) -> bool:
        """Whether the room is live here, has ended here, or has been joined before its open came."""
        return room in self._actions.rooms or self._memory.knows(room)

    def drain(self) -> None:
        """Take no new rooms; those that are open finish."""
        self._draining = True

    def handle(self, link: str, message: PrefillMessage) -> None:
        """A message came over `link`."""
        room = message.room
        if isinstance(message, Closed):
            return
        live = self._memory.live_older_than(room)
        if live is not None:
            self._fire(PrefillEvent.SUPERSEDED, live)
        parked = self._memory.parked_older_than(room)
        if parked is not None:
            self._actions.answers.turn_away_parked(parked, AbortReason.SUPERSEDED)
        event = self._event_of(link, message)
        self._fire(event, room, link=link, message=message, detail=_REFUSALS.get(event, ""))
        if isinstance(message, OpenPrefill) and room in self._actions.rooms:
            for early in self._memory.parking.take(room.request_id):
                event = PrefillEvent.JOIN if isinstance(early.message, Join) else PrefillEvent.RESERVATION
                self._fire(event, room, link=early.link, message=early.message)

    def link_lost(self, link: str) -> None:
        """A connection is gone, and every message in flight on it."""
        self._actions.answers.link_lost(link)
        for room, record in list(self.rooms.items()):
            if record.router == link:
                self._fire(PrefillEvent.ROUTER_LOST, room)
            elif record.decode == link:
                self._fire(PrefillEvent.DECODE_LOST, room, detail="the link to the decode half was lost")

    def tick(self) -> None:
        """Let time pass, put rooms into the engine, and send offers that are due. Cheap when there is nothing to do."""
        now = self._clock()
        for room, event in self._actions.timers.pop_due(now):
            age = now - self.rooms[room].opened_at
            self._fire(event, room, detail=f"{event.value}, {age:.1f} s after the room was opened")
        self._actions.answers.turn_away_overdue()
        self._place(now)
        self.counters.offered_pages += self._actions.offers.send_due()
        self._ticked_at = self._clock()

    def after_step(self, output: StepOutput) -> None:
        """Pass on what the engine did. Requests that are not this half's are left alone."""
        for request, _ in output.progress:
            record = self._record_of(request)
            if record is not None and record.timeline is not None:
                record.timeline.stepped(self._ticked_at)
        for request, scores in output.scores:
            record = self._record_of(request)
            if record is not None:
                self._actions.tell_scores(record, scores)
        for token in output.tokens:
            record = self._record_of(token.request)
            if record is not None:
                record.first = token
                self._fire(_token_event_of(record, token), record.room, detail=_ORPHAN)
        for failed in output.failed:
            record = self._record_of(failed.request)
            if record is not None:
                event = PrefillEvent.GRAMMAR_FAILED if failed.by_grammar else PrefillEvent.ENGINE_FAILED
                self._fire(event, record.room, detail=failed.why)
        for request, _ in output.progress:
            record = self._record_of(request)
            if record is not None and record.state is PrefillState.COMPUTING:
                self._fire(PrefillEvent.CHUNK, record.room)
        self._place(self._clock())
        self.counters.offered_pages += self._actions.offers.send_due()

    def next_deadline(self) -> float | None:
        """When `tick` must next be called even if nothing else happens; a reading of `clock`."""
        times = (self._actions.timers.next(), self._memory.parking.next_deadline())
        return min((when for when in times if when is not None), default=None)

    # ---- moves ------------------------------------------------------------------------------------------------

    def _fire(
        self, event: PrefillEvent, room: Room, *, link: str = "", message: Message | None = None, detail: str = ""
    ) -> None:
        """Make one move: enter the next state, then carry out its actions."""
        record = self.rooms.get(room)
        move = self._table.move(self._state_of(room), event)
        if record is not None:
            record.state = move.state
        cause = Cause(event, room, record, link, message, detail, PREFILL_ENDINGS.get(event))
        for action in move.actions:
            self._actions.carry_out(action, cause)

    def _state_of(self, room: Room) -> PrefillState:
        record = self.rooms.get(room)
        return _FATES[self._memory.fate(room)] if record is None else record.state

    def _event_of(self, link: str, message: OpenPrefill | Join | Reservation | Delivered | Abort) -> PrefillEvent:
        match message:
            case OpenPrefill():
                return self._opening_of(message)
            case Join():
                return PrefillEvent.JOIN
            case Reservation():
                return PrefillEvent.RESERVATION
            case Delivered():
                return PrefillEvent.DELIVERED
            case Abort():
                record = self.rooms.get(message.room)
                from_router = record is None or record.router == link
                return PrefillEvent.ABORT if from_router else PrefillEvent.PEER_ABORT
            case _:
                assert_never(message)

    def _opening_of(self, opening: OpenPrefill) -> PrefillEvent:
        if self._state_of(opening.room) is PrefillState.ABSENT:
            if self._draining:
                return PrefillEvent.OPEN_DRAINING
            if not opening.job.prompt:
                return PrefillEvent.OPEN_EMPTY
        return PrefillEvent.OPEN

    def _record_of(self, request: Request) -> PrefillRoom | None:
        record = self.rooms.get(request.key) if isinstance(request.key, Room) else None
        return record if record is not None and record.request is request else None

    def _place(self, now: float) -> None:
        """Put the rooms that may be computed now into the engine."""
        for record in self._ahead.take(now=now):
            try:
                self._engine.add(record.request)
            except RequestTooLong as error:
                self._fire(PrefillEvent.TOO_LONG, record.room, detail=str(error))
            except ValueError as error:
                self._fire(PrefillEvent.ENGINE_FAILED, record.room, detail=str(error))
            else:
                self._fire(PrefillEvent.PLACED, record.room)
                self._observe(PrefillStage.QUEUED, now - record.opened_at)


def _token_event_of(record: PrefillRoom, token: TokenOutput) -> PrefillEvent:
    """What a sampled token is to the room: the first of more, the last, or one that nobody will go on from."""
    if token.finish is not None:
        return PrefillEvent.LAST_TOKEN
    return PrefillEvent.FIRST_TOKEN if record.hands_over else PrefillEvent.ORPHAN_TOKEN


_REFUSALS = {
    PrefillEvent.OPEN_DRAINING: "this replica is draining and takes no new rooms",
    PrefillEvent.OPEN_EMPTY: "the prompt is empty; at least one token is needed to generate from",
}
_ORPHAN = "the sequence goes on after its first token, but the room was opened without a decode half"
