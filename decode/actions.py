"""The actions of the decode table: what each does to the engine, the copies, the room, and those at its links' ends.

`DecodeHalf` decides which actions a move has; nothing here decides. Live rooms, their deadlines and the links to
prefill replicas are kept here, because making and forgetting them are actions.
"""

from __future__ import annotations

from typing import assert_never

from decode.cause import DecodeCause, EngineRefused
from decode.copies import Copies
from decode.counters import DecodeCounters, DecodeStage
from decode.grants import GrantQueue
from decode.intake import PageIntake
from decode.ports import DecodePorts
from decode.rooms import DecodeRoom
from decode.table import DecodeAction, DecodeEvent, DecodeState
from decode.timelines import Timelines
from engine.events import token_event
from engine.grammar.constraint import GrammarMismatch
from engine.jobs import request_of
from engine.limits import RequestTooLong
from engine.request import Request
from protocol.answers import Answers
from protocol.room_memory import RoomMemory
from protocol.rooms import (
    Abort,
    Closed,
    Delivered,
    Handoff,
    Join,
    Message,
    Offer,
    OpenDecode,
    OpenGenerate,
    PeerAddress,
    PromptScores,
    Reservation,
    Room,
    RoomFailed,
)
from protocol.scoring import PositionScores
from protocol.timers import Timers


class DecodeActions:
    """Carries actions out, in the order the table gives them."""

    def __init__(self, ports: DecodePorts, *, memory: RoomMemory, queue: GrantQueue) -> None:
        self.rooms: dict[Room, DecodeRoom] = {}
        """Live rooms, and those whose pages are not drained yet."""
        self.links: dict[PeerAddress, str] = {}
        """One to each prefill replica, shared by its rooms."""
        self.timers: Timers[Room] = Timers()
        """Deadlines of live rooms."""
        self.answers = Answers(memory=memory, clock=ports.clock, send=ports.send)
        self.counters = DecodeCounters(messages=self.answers.counters)
        self.copies = Copies(ports, self.counters)
        self.timelines = Timelines(clock=ports.clock, unix_time=ports.unix_time, send=ports.send)
        self._ports = ports
        self._memory = memory
        self._queue = queue

    def carry_out(self, action: DecodeAction, cause: DecodeCause) -> None:
        """Do one thing."""
        match action:
            case DecodeAction.START:
                self._start(cause)
            case DecodeAction.JOIN:
                self._join(self.rooms[cause.room])
            case DecodeAction.ADD:
                self._add(self.rooms[cause.room])
            case DecodeAction.REFUSE:
                self.answers.refuse(cause.room, cause.link)
            case DecodeAction.COUNT_DUPLICATE:
                self.answers.duplicate()
            case DecodeAction.COUNT_STALE:
                self.answers.stale()
            case DecodeAction.CLOSED:
                self.answers.closed(cause.room, cause.link)
            case DecodeAction.OWE_CLOSED:
                cause.live.owed.append(cause.link)
            case DecodeAction.NOTE_OFFER:
                assert isinstance(cause.message, Offer)
                cause.live.intake.note(cause.message)
            case DecodeAction.NOTE_HANDOFF:
                self._note_handoff(cause)
            case DecodeAction.NOTE_PAGES:
                cause.live.intake.landed(cause.pages)
                cause.live.progress_at = self._ports.clock()
            case DecodeAction.RESERVED:
                self._reserved(cause.live)
            case DecodeAction.FETCH:
                self.copies.begin(cause.live)
            case DecodeAction.UNRESERVE:
                self._unreserve(cause.live)
            case DecodeAction.DELIVERED:
                self._tell(cause.live, Delivered(cause.room))
            case DecodeAction.ADMIT:
                self._admit(cause.live)
            case DecodeAction.EMIT:
                self.emit(cause.live)
            case DecodeAction.QUARANTINE:
                self._quarantine(cause.live)
            case DecodeAction.FREE:
                self._ports.engine.drained(cause.room)
                self._queue.changed()
            case DecodeAction.ANSWER_CLOSED:
                for link in cause.live.owed:
                    self._ports.send(link, Closed(cause.room))
            case DecodeAction.RELEASE:
                self._ports.engine.abort(cause.room)
                self._queue.changed()
            case DecodeAction.BURY:
                self._bury(cause)
            case DecodeAction.BAR:
                self._memory.end(cause.room, reason=cause.reason, deadline=None, lived=False)
            case DecodeAction.FORGET:
                del self.rooms[cause.room]
            case DecodeAction.FAIL:
                self._fail(cause)
            case DecodeAction.TELL_PREFILL:
                assert cause.reason is not None
                self._tell(cause.live, Abort(cause.room, cause.reason))
            case _:
                assert_never(action)

    def emit(self, record: DecodeRoom) -> None:
        """Send the room's newest token to its router."""
        assert record.output is not None
        if record.timeline is not None:
            self.timelines.token(record)
        self._ports.emit(record.router, token_event(record.output, record.room))

    def tell_scores(self, record: DecodeRoom, scores: PositionScores) -> None:
        """The next scores of the room's prompt, which is computed here, go to its router."""
        assert record.request.scoring is not None
        for piece in scores.pieces(record.request.scoring):
            self._ports.send(record.router, PromptScores(record.room, piece))

    # ---- beginning ------------------------------------------------------------------------------------------

    def _start(self, cause: DecodeCause) -> None:
        opening, now = cause.message, self._ports.clock()
        assert isinstance(opening, OpenDecode | OpenGenerate)
        room, job = opening.room, opening.job
        receives = isinstance(opening, OpenDecode)
        request = request_of(job, room, arrival=now, constraint=self._ports.constrain(room), scored_elsewhere=receives)
        self.rooms[room] = DecodeRoom(
            room=room,
            router=cause.link,
            request=request,
            intake=self._intake(opening, request),
            opened_at=now,
            queued_at=now,
            deadline=now + opening.ttl_ms / 1000,
            state=DecodeState.QUEUED if receives else DecodeState.RUNNING,
            address=opening.prefill if isinstance(opening, OpenDecode) else None,
        )
        if job.timeline:
            self.timelines.begin(self.rooms[room])
        self._memory.begin(room)
        self.timers.set(room, now + opening.ttl_ms / 1000)
        if receives:
            self.counters.opened += 1
        else:
            self.counters.generating += 1

    def _intake(self, opening: OpenDecode | OpenGenerate, request: Request) -> PageIntake:
        ours = self._ports.engine.config.page_size
        theirs = opening.prefill_page_size if isinstance(opening, OpenDecode) else 0
        return PageIntake(request.num_tokens, page_size=ours, source_page_size=theirs or ours)

    def _add(self, record: DecodeRoom) -> None:
        try:
            self._ports.engine.add(record.request)
        except RequestTooLong as error:
            raise EngineRefused(DecodeEvent.TOO_LONG, str(error)) from error
        except ValueError as error:
            raise EngineRefused(DecodeEvent.ENGINE_FAILED, str(error)) from error

    def _join(self, record: DecodeRoom) -> None:
        assert record.address is not None
        if record.address not in self.links:
            self.links[record.address] = self._ports.connect(record.address)
        record.prefill = self.links[record.address]
        self._tell(record, Join(record.room, grain=record.intake.grain_tokens))
        self._queue.enter(record)

    # ---- receiving ----------------------------------------------------------------------------------------------

    def _note_handoff(self, cause: DecodeCause) -> None:
        record, handoff = cause.live, cause.message
        assert isinstance(handoff, Handoff)
        if record.handoff is not None:
            self.answers.duplicate()
            return
        record.handoff = handoff
        if record.timeline is not None:
            record.timeline.handed_over(self._ports.clock())
        self._queue.changed()

    def _reserved(self, record: DecodeRoom) -> None:
        """Pages were granted: say which need no transfer."""
        now = self._ports.clock()
        held = record.request.num_cached // self._ports.engine.config.page_size
        self._queue.leave(record)
        record.intake.begin(held)
        record.granted_at = record.progress_at = now
        if record.timeline is not None:
            record.timeline.granted(now)
        self.counters.granted += 1
        self.counters.held_pages += held
        self._ports.observe(DecodeStage.RESERVE_WAIT, now - record.opened_at)
        self._tell(record, Reservation(record.room, record.intake.held_pages))

    def _unreserve(self, record: DecodeRoom) -> None:
        self.counters.revocations += 1
        self._ports.engine.unreserve(record.request)
        record.queued_at = self._ports.clock()
        if record.timeline is not None:
            record.timeline.revoked(record.queued_at)
        self._queue.enter(record)

    def _admit(self, record: DecodeRoom) -> None:
        handoff, now = record.handoff, self._ports.clock()
        assert handoff is not None
        record.prefill = None
        try:
            self._ports.engine.admit(record.request, handoff.token)
        except GrammarMismatch as error:
            raise EngineRefused(DecodeEvent.GRAMMAR_FAILED, str(error)) from error
        except ValueError as error:
            raise EngineRefused(DecodeEvent.ENGINE_FAILED, str(error)) from error
        self.counters.admitted += 1
        self._ports.observe(DecodeStage.RECEIVING, now - record.granted_at)
        if handoff.computed_at:
            seconds = self._ports.unix_time() - handoff.computed_at
            self._ports.observe(DecodeStage.HANDOVER, max(0.0, seconds))  # two hosts' clocks: theirs may be ahead

    # ---- ending -----------------------------------------------------------------------------------------------

    def _bury(self, cause: DecodeCause) -> None:
        record = cause.record
        if record is not None:
            self.timers.cancel(record.room)
            self._queue.leave(record)
        if isinstance(cause.message, Abort):
            self.counters.aborts[cause.message.reason] += 1
        elif cause.event is DecodeEvent.LAST_TOKEN:
            self.counters.finished += 1
            self._queue.changed()
        self._memory.end(cause.room, reason=cause.reason, deadline=record.deadline if record else None)

    def _quarantine(self, record: DecodeRoom) -> None:
        """Nobody gets these pages before every copy into them has ended."""
        self._ports.engine.abort(record.room, quarantine=True)
        self.copies.cancel(record)

    def _fail(self, cause: DecodeCause) -> None:
        """The router decides what follows."""
        assert cause.ending is not None
        code = cause.ending.code
        self.counters.failures[code] += 1
        if cause.record is not None:
            self.timelines.tell(cause.record)
        self._ports.send(
            cause.record.router if cause.record else cause.link, RoomFailed(cause.room, code, cause.detail)
        )

    def _tell(self, record: DecodeRoom, message: Message) -> None:
        if record.prefill is not None:
            self._ports.send(record.prefill, message)
