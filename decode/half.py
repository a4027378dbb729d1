"""The decode half of every room on one replica: reserve pages, take the KV, go on after the first token, stream.

Lifecycle of a room: `OpenDecode` makes it and joins the prefill half; when pages are granted (`decode/grants.py`) what
is offered is copied into them by the transfer layer, batch by batch. With every page verified and the handoff here, the
request is admitted to the running batch and prefill is told. `OpenGenerate` skips all that: the engine computes the
prompt itself. What happens in which state is `DECODE_TABLE` (`decode/table.py`).

Everything here runs on the engine thread, but that others may hand over an offer while it steps (`hasten`). It opens
no socket and never waits: messages go out through `send` and `emit`, time comes from `clock`. The owner calls `handle`,
`fetched` and `link_lost` for what arrives, then `tick`, then `after_step` with what the engine did, and sleeps no
longer than `next_deadline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import assert_never, cast

from decode.actions import DecodeActions
from decode.cause import DecodeCause, EngineRefused
from decode.counters import DecodeCounters
from decode.grants import GrantQueue
from decode.ports import DecodePorts, JobKey
from decode.rooms import DecodeRoom
from decode.table import DECODE_ENDINGS, DECODE_TABLE, DecodeEvent, DecodeState
from decode.traffic import TrafficBook
from engine.limits import RequestTooLong
from engine.outputs import StepOutput
from engine.request import Request
from protocol.room_memory import Fate, MemoryLimits, RoomMemory
from protocol.rooms import (
    Abort,
    AbortReason,
    Closed,
    Handoff,
    Message,
    Offer,
    OpenDecode,
    OpenGenerate,
    Room,
)
from transfer.jobs import FetchResult

DecodeMessage = OpenDecode | OpenGenerate | Offer | Handoff | Abort | Closed

_FATES = {
    Fate.UNKNOWN: DecodeState.ABSENT,
    Fate.ENDED: DecodeState.ENDED,
    Fate.BARRED: DecodeState.BARRED,
    Fate.STALE: DecodeState.STALE,
}


class DecodeHalf:
    """All decode halves over one engine.

    `lease_s` is how long a reservation may stand still before it can be taken back for a room that is computed,
    `ageing_s` how long a room waits before all others wait for it, `retry_s` how often the queue is tried though
    nothing here has changed.
    """

    def __init__(
        self,
        ports: DecodePorts,
        *,
        lease_s: float = 2.0,
        ageing_s: float = 5.0,
        retry_s: float = 0.05,
        limits: MemoryLimits | None = None,
    ) -> None:
        self._engine = ports.engine
        self._clock = ports.clock
        self._table = DECODE_TABLE
        self._memory = RoomMemory(clock=ports.clock, limits=limits or MemoryLimits())
        self._queue = GrantQueue(lease_s=lease_s, ageing_s=ageing_s, retry_s=retry_s)
        self._actions = DecodeActions(ports, memory=self._memory, queue=self._queue)
        self._draining = False

    # ---- what the owner calls -------------------------------------------------------------------------------

    @property
    def rooms(self) -> Mapping[Room, DecodeRoom]:
        """The live rooms, and those that only wait for their copies to end."""
        return self._actions.rooms

    @property
    def idle(self) -> bool:
        return not self._actions.rooms

    @property
    def counters(self) -> DecodeCounters:
        return self._actions.counters

    @property
    def traffic(self) -> TrafficBook:
        return self._actions.copies.traffic

    @property
    def num_waiting(self) -> int:
        """Open rooms that wait for pages."""
        return len(self._queue)

    def landing(self) -> frozenset[Room]:
        """The rooms that wait for nothing but the end of copies that run."""
        rooms = self._actions.rooms.values()
        return frozenset(record.room for record in rooms if record.is_landing)

    def knows(self, room: Room) -> bool:
        """Whether the room is live here or has ended here."""
        return room in self._actions.rooms or self._memory.knows(room)

    def drain(self) -> None:
        """Take no new rooms; those that are open finish."""
        self._draining = True

    def handle(self, link: str, message: DecodeMessage) -> None:
        """A message came over `link`."""
        if isinstance(message, Closed):
            return
        room = message.room
        older = self._memory.live_older_than(room)
        if older is not None:
            self._fire(DecodeEvent.SUPERSEDED, older)
        record = self.rooms.get(room)
        wrong = record.misfit(message) if record is not None else ""
        event = DecodeEvent.BAD_OFFER if wrong else self._event_of(link, message)
        self._fire(event, room, link=link, message=message, detail=wrong or _REFUSALS.get(event, ""))

    def hasten(self, link: str, offer: Offer) -> bool:
        """Handle an offer in the middle of a step, if it does nothing but begin copies; False when it has to wait. To
        be called by one thread at a time, and not while the owner is in any other method."""
        record = self.rooms.get(offer.room)
        if record is None or record.state is not DecodeState.RECEIVING or record.misfit(offer):
            return False
        self.handle(link, offer)  # what lets the room go on is never an offer, but the end of a copy or the handoff
        return True

    def fetched(self, result: FetchResult) -> None:
        """A copy has ended: nothing of it can land any more. Raises KeyError for one that this half did not begin."""
        room, number = cast(JobKey, result.key)
        record = self.rooms[room]
        pages = self._actions.copies.end(record, number, result, linked=result.peer in self._actions.links)
        event = DecodeEvent.FETCHED if result.ok else DecodeEvent.FETCH_FAILED
        self._fire(event, room, detail=result.error or "", pages=pages)

    def link_lost(self, link: str) -> None:
        """A connection is gone, and every message in flight on it."""
        links = self._actions.links
        for address in [address for address, known in links.items() if known == link]:
            del links[address]
            self._actions.copies.traffic.forget(address)
        for room, record in list(self.rooms.items()):
            if record.router == link:
                self._fire(DecodeEvent.ROUTER_LOST, room)
            elif record.prefill == link:
                self._fire(DecodeEvent.PREFILL_LOST, room, detail="the link to the prefill half was lost")

    def tick(self) -> None:
        """Let time pass, and grant pages. Cheap when there is nothing to do."""
        now = self._clock()
        for room in self._actions.timers.pop_due(now):
            age = now - self.rooms[room].opened_at
            self._fire(DecodeEvent.DEADLINE, room, detail=f"deadline, {age:.1f} s after the room was opened")
        if self._queue.is_due(now):
            self._grant(now)
            for victim in self._queue.revocable(self.rooms.values(), now):
                if not self._queue.has_computed:
                    break
                self._fire(DecodeEvent.REVOKED, victim.room)
                self._grant(now)
        self._actions.timelines.ticked()

    def after_step(self, output: StepOutput) -> None:
        """Pass on what the engine did. Requests that are not this half's are left alone."""
        self._actions.timelines.stepped()
        for request, scores in output.scores:
            record = self._record_of(request)
            if record is not None:
                self._actions.tell_scores(record, scores)
        for token in output.tokens:
            record = self._record_of(token.request)
            if record is None:
                continue
            record.output = token
            if token.finish is not None:
                self._fire(DecodeEvent.LAST_TOKEN, record.room)
            else:
                # The move of TOKEN, which only emits, without looking it up: it is made thousands of times a second.
                assert record.state is DecodeState.RUNNING, f"{record.room} is {record.state.name} and got a token"
                self._actions.emit(record)
        for failed in output.failed:
            record = self._record_of(failed.request)
            if record is not None:
                event = DecodeEvent.GRAMMAR_FAILED if failed.by_grammar else DecodeEvent.ENGINE_FAILED
                self._fire(event, record.room, detail=failed.why)

    def next_deadline(self) -> float | None:
        """When `tick` must next be called even if nothing else happens; a reading of `clock`."""
        times = (self._actions.timers.next(), self._queue.next_deadline())
        return min((when for when in times if when is not None), default=None)

    # ---- moves ------------------------------------------------------------------------------------------------

    def _fire(
        self,
        event: DecodeEvent,
        room: Room,
        *,
        link: str = "",
        message: Message | None = None,
        detail: str = "",
        pages: Sequence[int] = (),
    ) -> None:
        """Make the move of one event: enter the next state, carry out its actions, make the moves that follow from it.

        What the engine refuses ends the room.
        """
        record = self.rooms.get(room)
        move = self._table.move(self._state_of(room), event)
        if record is not None:
            record.state = move.state
        cause = DecodeCause(event, room, record, link, message, detail, DECODE_ENDINGS.get(event), pages)
        try:
            for action in move.actions:
                self._actions.carry_out(action, cause)
        except EngineRefused as refusal:
            self._fire(refusal.event, room, detail=str(refusal))
            return
        record = self.rooms.get(room)
        if record is not None and record.state is DecodeState.RECEIVING and record.is_complete:
            self._fire(DecodeEvent.COMPLETE, room)
        elif record is not None and record.state is DecodeState.DRAINING and not record.jobs:
            self._fire(DecodeEvent.DRAINED, room)

    def _state_of(self, room: Room) -> DecodeState:
        record = self.rooms.get(room)
        return _FATES[self._memory.fate(room)] if record is None else record.state

    def _event_of(self, link: str, message: OpenDecode | OpenGenerate | Offer | Handoff | Abort) -> DecodeEvent:
        match message:
            case OpenDecode():
                return self._opening_of(message, DecodeEvent.OPEN_DECODE)
            case OpenGenerate():
                return self._opening_of(message, DecodeEvent.OPEN_GENERATE)
            case Offer():
                return DecodeEvent.OFFER
            case Handoff():
                return DecodeEvent.HANDOFF
            case Abort():
                if link not in self._actions.links.values():
                    return DecodeEvent.ABORT
                unheard = message.reason is AbortReason.NEVER_OPENED
                return DecodeEvent.NEVER_OPENED if unheard else DecodeEvent.PEER_ABORT
            case _:
                assert_never(message)

    def _opening_of(self, opening: OpenDecode | OpenGenerate, event: DecodeEvent) -> DecodeEvent:
        if self._state_of(opening.room) is DecodeState.ABSENT:
            if self._draining:
                return DecodeEvent.OPEN_DRAINING
            if not opening.job.prompt:
                return DecodeEvent.OPEN_EMPTY
        return event

    def _record_of(self, request: Request) -> DecodeRoom | None:
        record = self.rooms.get(request.key) if isinstance(request.key, Room) else None
        return record if record is not None and record.request is request else None

    def _grant(self, now: float) -> None:
        """Give pages to every room that they can be had for."""
        for record in self._queue.begin_pass(now):
            try:
                granted = self._engine.reserve(record.request)
            except ValueError as error:
                event = DecodeEvent.TOO_LONG if isinstance(error, RequestTooLong) else DecodeEvent.ENGINE_FAILED
                self._fire(event, record.room, detail=str(error))
                continue
            if granted:
                self._fire(DecodeEvent.GRANTED, record.room)
            elif self._queue.is_aged(record, now):
                return


_REFUSALS = {
    DecodeEvent.OPEN_DRAINING: "this replica is draining and takes no new rooms",
    DecodeEvent.OPEN_EMPTY: "the prompt is empty; at least one token is needed to generate from",
    DecodeEvent.NEVER_OPENED: "the prefill replica never heard of the room",
}
