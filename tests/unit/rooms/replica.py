"""One replica: the real engine on a toy model, and the two real halves over it, run as the engine thread runs them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from decode.half import DecodeHalf
from decode.ports import DecodePorts
from decode.table import DecodeState
from prefill.half import PrefillHalf
from prefill.ports import PrefillPorts
from protocol.room_memory import MemoryLimits
from protocol.rooms import (
    Abort,
    Closed,
    Delivered,
    Join,
    Message,
    OpenPrefill,
    PeerAddress,
    Phases,
    PromptScores,
    Reservation,
    Room,
    RoomFailed,
    StepFrame,
    TokenEvent,
)
from tests.unit.rooms.copies import Copies, Key, pool_checksums
from tests.unit.toy_model import toy_engine

if TYPE_CHECKING:
    from tests.unit.rooms.world import World


class LawBroken(AssertionError):
    """An invariant of the protocol does not hold."""


class Replica:
    """One life (`boot`) of one replica. Everything it sends leaves at the end of a pass, tokens first."""

    def __init__(self, world: World, name: str, boot: int, *, pages: int) -> None:
        self.world = world
        self.name = name
        self.address = PeerAddress(name, boot, "test", 1)
        self.alive = True
        self.engine, self._model = toy_engine(
            pages=pages, page_size=2, chunked_prefill_size=4, decode_headroom_tokens=2, max_running_requests=4
        )
        self.copies = Copies(self.engine.pool, world.pool_of, world.reaches)
        self.touched = False
        """Something was handled since the last pass."""
        self.final: dict[Room, set[str]] = defaultdict(set)
        """What this replica has said that ends a room here."""
        self.emitted: dict[Room, list[int]] = defaultdict(list)
        """Positions of the tokens emitted for each room."""
        self._messages: list[tuple[str, Message]] = []
        self._scores: list[tuple[str, Message]] = []
        self._tokens: dict[str, list[TokenEvent]] = defaultdict(list)
        limits = MemoryLimits(max_tombstones=64, grace_s=1000.0, tombstone_s=1000.0, max_parked=8, parked_s=5.0)
        self.prefill = PrefillHalf(
            PrefillPorts(
                engine=self.engine,
                checksums=self._checksums,
                send=self._send,
                emit=self._emit,
                clock=world.clock,
                unix_time=world.clock,
            ),
            lease_s=6.0,
            ageing_s=2.0,
            limits=limits,
        )
        self.decode = DecodeHalf(
            DecodePorts(
                engine=self.engine,
                fetcher=self.copies,
                on_fetched=self.decode_fetched,
                connect=self._connect,
                send=self._send,
                emit=self._emit,
                clock=world.clock,
                unix_time=world.clock,
            ),
            lease_s=3.0,
            ageing_s=4.0,
            retry_s=1.0,
            limits=limits,
        )

    # ---- what happens to it -----------------------------------------------------------------------------------

    def receive(self, wire: str, message: Message) -> None:
        """Handle one message as the engine thread does."""
        self.touched = True
        if isinstance(message, OpenPrefill | Join | Reservation | Delivered):
            self.prefill.handle(wire, message)
        elif isinstance(message, Abort | Closed):
            for half in self._halves_of(wire, message.room):
                half.handle(wire, message)
        else:
            self.decode.handle(wire, message)

    def _halves_of(self, wire: str, room: Room) -> list[PrefillHalf | DecodeHalf]:
        if not wire.startswith(("router", self.name)):
            return [self.prefill]
        if not wire.startswith("router"):
            return [self.decode]
        if self.prefill.knows(room):
            return [self.prefill]
        return [self.decode] if self.decode.knows(room) else [self.decode, self.prefill]

    def lose(self, wire: str) -> None:
        self.touched = True
        self.prefill.link_lost(wire)
        self.decode.link_lost(wire)

    def land(self, key: Key, *, corrupt: bool = False) -> None:
        self.copies.land(key, corrupt=corrupt)

    def finish(self, key: Key) -> None:
        self.touched = True
        self.decode.fetched(self.copies.finish(key))

    def run_pass(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """One pass of the engine thread; `meanwhile` happens in the middle of the engine's step, if it makes one."""
        self.touched = False
        self._model.meanwhile = meanwhile
        self.prefill.tick()
        self.decode.tick()
        if self.engine.has_work():
            output = self.engine.step()
            self.decode.after_step(output)
            self.prefill.after_step(output)
        self._flush()

    def fail_next_step(self) -> None:
        """The model will raise in the next step."""
        self._model.fail_at.add(self._model.passes + 1)

    def drain(self) -> None:
        """Take no new rooms."""
        self.prefill.drain()
        self.decode.drain()

    @property
    def wants_pass(self) -> bool:
        deadline = self.next_deadline
        return self.touched or self.engine.has_work() or (deadline is not None and deadline <= self.world.now)

    @property
    def next_deadline(self) -> float | None:
        times = [when for when in (self.prefill.next_deadline(), self.decode.next_deadline()) if when is not None]
        return min(times, default=None)

    # ---- what must always hold of it ----------------------------------------------------------------------------

    def check(self, rooms: Sequence[Room]) -> None:
        """Books, owners and finality; `rooms` are all that were ever opened anywhere."""
        report = self.engine.audit()
        if not report.balanced:
            raise LawBroken(f"{self.name}: {report.problems}")
        for key, copy in self.copies.running.items():
            if not set(copy.job.target_pages) <= set(report.owners.get(key[0], ())):
                raise LawBroken(f"{self.name}: {key} writes into pages {copy.job.target_pages} that are not its room's")
        live: dict[str, Room] = {}
        for room in rooms:
            here = self.live_halves(room)
            if self.engine.get(room) is not None and not here:
                raise LawBroken(f"{self.name}: {room} is in the engine but in no half")
            if here and self.final[room]:
                raise LawBroken(f"{self.name}: {room} lives although it sent {self.final[room]}")
            for half in here:
                if (other := live.setdefault(half + room.request_id, room)) != room:
                    raise LawBroken(f"{self.name}: {room} and {other} live at once")
        stray = set(report.owners) - set(self.prefill.rooms) - set(self.decode.rooms)
        if stray:
            raise LawBroken(f"{self.name}: {stray} own pages but are in no half")

    def live_halves(self, room: Room) -> list[str]:
        """Which halves hold the room, those that only drain not counted."""
        here = ["prefill"] if room in self.prefill.rooms else []
        decode = self.decode.rooms.get(room)
        return [*here, "decode"] if decode is not None and decode.state is not DecodeState.DRAINING else here

    @property
    def is_empty(self) -> bool:
        return self.prefill.idle and self.decode.idle and not self.copies.running and self.engine.audit().idle

    # ---- its ports ----------------------------------------------------------------------------------------------

    def decode_fetched(self, result: object) -> None:
        raise AssertionError("the schedule delivers results itself")

    def _checksums(self, pages: Sequence[int], grain: int) -> list[int]:
        return pool_checksums(self.engine.pool, pages)

    def _send(self, wire: str, message: Message) -> None:
        if isinstance(message, Phases):
            self._check_phases(message)
            return  # no router acts on them, so to deliver them would only make more schedules
        if isinstance(message, PromptScores):
            if self.emitted[message.room] or self.final[message.room]:
                raise LawBroken(f"{self.name}: scores of {message.room} after a token or its end")
            self._scores.append((wire, message))
            return
        self._messages.append((wire, message))
        if isinstance(message, RoomFailed | Closed):
            self.final[message.room].add(type(message).__name__)

    def _check_phases(self, message: Phases) -> None:
        if self.final[message.room]:
            raise LawBroken(f"{self.name}: phases of {message.room} after {self.final[message.room]}")
        for phase in message.phases:
            if phase.end_us < phase.start_us:
                raise LawBroken(f"{self.name}: {message.room} has a phase that ends before it starts: {phase}")

    def _emit(self, wire: str, event: TokenEvent) -> None:
        room = Room(event.request_id, event.epoch)
        self.world.check_token(event)
        if self.final[room]:
            raise LawBroken(f"{self.name}: a token of {room} after {self.final[room]}")
        if self.emitted[room] and self.emitted[room][-1] + 1 != event.position:
            raise LawBroken(f"{self.name}: {room} went from position {self.emitted[room][-1]} to {event.position}")
        self.emitted[room].append(event.position)
        if event.finish is not None:
            self.final[room].add("its last token")
        self._tokens[wire].append(event)

    def _connect(self, address: PeerAddress) -> str:
        return self.world.connect(self.name, address)

    def _flush(self) -> None:
        load = self.engine.load()
        for wire, scores in self._scores:
            self.world.send(self.name, wire, scores)
        self._scores.clear()
        for wire, tokens in self._tokens.items():
            self.world.send(self.name, wire, StepFrame(tokens, load))
        for wire, message in self._messages:
            self.world.send(self.name, wire, message)
        self._tokens.clear()
        self._messages.clear()
