"""The actions of the prefill table: what each does to the engine, the room, and those at the other ends of its links.

`PrefillHalf` decides which actions a move has; nothing here decides. Live rooms and their deadlines are kept here,
because making and burying a room are actions.
"""

from __future__ import annotations

from typing import assert_never

from engine.events import token_event
from engine.jobs import request_of
from engine.request import RequestStatus
from prefill.ahead import AheadLimit
from prefill.counters import PrefillCounters, PrefillStage
from prefill.offers import Offers
from prefill.ports import PrefillPorts
from prefill.rooms import PrefillRoom
from prefill.table import PrefillAction, PrefillEvent, PrefillState
from prefill.timeline import PrefillTimeline
from protocol.answers import Answers
from protocol.cause import Cause
from protocol.phases import PhaseLog
from protocol.room_memory import RoomMemory
from protocol.rooms import (
    Abort,
    AbortReason,
    Handoff,
    Join,
    OpenPrefill,
    Phases,
    PromptScores,
    Reservation,
    Room,
    RoomFailed,
)
from protocol.scoring import PositionScores
from protocol.timers import Timers

PrefillCause = Cause[PrefillEvent, PrefillRoom]


class PrefillActions:
    """Carries actions out, in the order the table gives them."""

    def __init__(self, ports: PrefillPorts, *, memory: RoomMemory, ahead: AheadLimit, lease_s: float) -> None:
        self.rooms: dict[Room, PrefillRoom] = {}
        """The live rooms."""
        self.timers: Timers[tuple[Room, PrefillEvent]] = Timers()
        """When which event (`DEADLINE` or `LEASE_OVER`) comes to which live room."""
        self.offers = Offers(page_size=ports.engine.config.page_size, checksums=ports.checksums, send=ports.send)
        self.answers = Answers(memory=memory, clock=ports.clock, send=ports.send)
        self.counters = PrefillCounters(messages=self.answers.counters)
        self._ports = ports
        self._memory = memory
        self._ahead = ahead
        self._lease_s = lease_s

    def carry_out(self, action: PrefillAction, cause: PrefillCause) -> None:
        """Do one thing."""
        match action:
            case PrefillAction.START:
                self._start(cause)
            case PrefillAction.PARK:
                assert cause.message is not None
                self.answers.park(cause.room, cause.link, cause.message)
            case PrefillAction.REFUSE:
                self.answers.refuse(cause.room, cause.link)
            case PrefillAction.COUNT_DUPLICATE:
                self.answers.duplicate()
            case PrefillAction.COUNT_STALE:
                self.answers.stale()
            case PrefillAction.CLOSED:
                self.answers.closed(cause.room, cause.link)
            case PrefillAction.ANSWER_ABORT:
                self.answers.too_late(cause.room, cause.link)
            case PrefillAction.BIND:
                self._bind(cause)
            case PrefillAction.NOTE_RESERVED:
                self._note_reserved(cause)
            case PrefillAction.OFFER:
                self.offers.add(cause.live)
            case PrefillAction.EMIT:
                self._emit_token(cause.live)
            case PrefillAction.HANDOFF:
                self._hand_off(cause.live)
            case PrefillAction.START_LEASE:
                self.timers.set((cause.room, PrefillEvent.LEASE_OVER), self._ports.clock() + self._lease_s)
            case PrefillAction.RELEASE:
                self._release(cause.live)
            case PrefillAction.BURY:
                self._bury(cause)
            case PrefillAction.BAR:
                self._bar(cause)
            case PrefillAction.FAIL:
                self._fail(cause)
            case PrefillAction.TELL_DECODE:
                self._tell_decode(cause)
            case _:
                assert_never(action)

    # ---- beginning ------------------------------------------------------------------------------------------

    def _start(self, cause: PrefillCause) -> None:
        opening, now = cause.message, self._ports.clock()
        assert isinstance(opening, OpenPrefill)
        room, job = opening.room, opening.job
        request = request_of(job, room, arrival=now, constraint=self._ports.constrain(room), retain=True)
        record = PrefillRoom(
            room=room,
            router=cause.link,
            request=request,
            num_pages=-(-request.num_tokens // self._ports.engine.config.page_size),
            hands_over=opening.decode is not None,
            opened_at=now,
            deadline=now + opening.ttl_ms / 1000,
        )
        if job.timeline:
            record.timeline = PrefillTimeline(PhaseLog(self._ports.clock, self._ports.unix_time), opened_at=now)
        self.counters.opened += 1
        self.rooms[room] = record
        self._memory.begin(room)
        self.timers.set((room, PrefillEvent.DEADLINE), record.deadline)
        self._ahead.enter(record)

    def _bind(self, cause: PrefillCause) -> None:
        record = cause.live
        if record.decode == cause.link:
            self.answers.duplicate()
            return
        join = cause.message
        assert isinstance(join, Join)
        record.decode, record.grain = cause.link, join.grain
        record.offered = range(0)
        if record.timeline is not None:
            record.timeline.joined(self._ports.clock())
            if record.state is PrefillState.RETAINED:  # its first token has gone without this
                self._tell_phases(record)

    def _note_reserved(self, cause: PrefillCause) -> None:
        record, reservation = cause.live, cause.message
        assert isinstance(reservation, Reservation)
        record.held_pages = reservation.held_pages
        record.reserved = True
        self._ahead.reserved(record)

    # ---- the first token --------------------------------------------------------------------------------------

    def _emit_token(self, record: PrefillRoom) -> None:
        assert record.first is not None
        record.computed_at, record.retained_at = self._ports.unix_time(), self._ports.clock()
        if record.timeline is not None:
            record.timeline.sampled(record.retained_at)
            self._tell_phases(record)
        self._ports.emit(record.router, token_event(record.first, record.room))
        self._ports.observe(PrefillStage.FIRST_TOKEN, record.retained_at - record.opened_at)

    def _hand_off(self, record: PrefillRoom) -> None:
        first = record.first
        assert first is not None
        if record.decode is not None:
            self._ports.send(
                record.decode,
                Handoff(record.room, first.token, first.position, record.num_pages, computed_at=record.computed_at),
            )

    # ---- ending -----------------------------------------------------------------------------------------------

    def _release(self, record: PrefillRoom) -> None:
        """Give the pages up. Decode may still be reading them; what it reads then fails its checksum."""
        if record.request.status is RequestStatus.SENDING:
            self._ports.engine.release(record.room)
        elif record.request.status is not RequestStatus.NEW:
            self._ports.engine.abort(record.room)

    def _bury(self, cause: PrefillCause) -> None:
        record = cause.record
        if record is not None:
            del self.rooms[record.room]
            self.offers.drop(record)
            self._ahead.leave(record)
            for event in (PrefillEvent.DEADLINE, PrefillEvent.LEASE_OVER):
                self.timers.cancel((record.room, event))
        if isinstance(cause.message, Abort):
            self.counters.aborts[cause.message.reason] += 1
        elif cause.event is PrefillEvent.DELIVERED:
            self.counters.delivered += 1
            self._ports.observe(PrefillStage.RETAINED, self._ports.clock() - cause.live.retained_at)
        elif cause.event is PrefillEvent.LAST_TOKEN:
            self.counters.finished_early += 1
        reason = cause.reason
        self._memory.end(cause.room, reason=reason, deadline=record.deadline if record else None)
        self.answers.turn_away_parked(cause.room, reason or AbortReason.PEER_FAILED)

    def _bar(self, cause: PrefillCause) -> None:
        reason = cause.reason
        assert reason is not None
        self._memory.end(cause.room, reason=reason, deadline=None, lived=False)
        self.answers.turn_away_parked(cause.room, reason, but=cause.link)

    def _fail(self, cause: PrefillCause) -> None:
        """The router decides what follows."""
        assert cause.ending is not None
        code = cause.ending.code
        self.counters.failures[code] += 1
        if cause.record is not None:
            self._tell_phases(cause.record)
        self._ports.send(
            cause.record.router if cause.record else cause.link, RoomFailed(cause.room, code, cause.detail)
        )

    def _tell_phases(self, record: PrefillRoom) -> None:
        """What the router has not heard of where the time went, if it asked."""
        phases = record.timeline.take() if record.timeline is not None else []
        if phases:
            self._ports.send(record.router, Phases(record.room, phases))

    def tell_scores(self, record: PrefillRoom, scores: PositionScores) -> None:
        """The next scores of the room's prompt go to its router."""
        assert record.request.scoring is not None
        for piece in scores.pieces(record.request.scoring):
            self._ports.send(record.router, PromptScores(record.room, piece))

    def _tell_decode(self, cause: PrefillCause) -> None:
        """Without a join there is nobody to tell: the tombstone answers it when it comes."""
        link, reason = cause.live.decode, cause.reason
        assert reason is not None
        if link is not None:
            self._ports.send(link, Abort(cause.room, reason))
