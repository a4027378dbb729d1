"""In which order a replica's pass leaves: what must be known before a token goes before it."""

from __future__ import annotations

from cluster.outbox import Outbox
from protocol.phases import Phase
from protocol.rooms import FailureCode, Load, Phases, Room, RoomFailed, StepFrame, TokenEvent

LOAD = Load(0, 0, 0, 100, 0, 100)
ROOM = Room("a", 0)
TOKEN = TokenEvent("a", 0, 0, 0, 7)
PHASES = Phases(ROOM, [Phase("queue", 1, 2)])
FAILED = RoomFailed(ROOM, FailureCode.INTERNAL, "as scripted")


def test_phases_go_before_tokens_and_tokens_before_messages() -> None:
    outbox = Outbox()
    outbox.send("router", FAILED)
    outbox.emit("router", TOKEN)
    outbox.send("router", PHASES)
    frame = StepFrame([TOKEN], LOAD)
    assert outbox.take(lambda: LOAD) == [("router", PHASES), ("router", frame), ("router", FAILED)]
    assert outbox.take(lambda: LOAD) == []


def test_phases_alone_are_sent_without_a_frame() -> None:
    outbox = Outbox()
    outbox.send("router", PHASES)
    assert outbox.take(lambda: LOAD) == [("router", PHASES)]
