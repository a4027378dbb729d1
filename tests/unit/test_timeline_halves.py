"""What the halves of a room tell of where its time went: only when asked, in order, and before they end."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from protocol.codec import decode_body, encode_frame
from protocol.phases import Phase, PhaseLog, PhaseName
from protocol.rooms import (
    Delivered,
    FailureCode,
    Handoff,
    Job,
    Join,
    Message,
    Offer,
    Phases,
    Reservation,
    Room,
    RoomFailed,
)
from tests.unit.rooms.bench import DecodeBench, PrefillBench, job, open_decode, open_generate, open_prefill

ROOM = Room("a", 0)
PROMPT = [3, 1, 4, 1, 5, 9, 2]
"""Four pages of two tokens; two steps of four tokens in prefill."""
LINK = "prefill#1"
BEGAN_US = round(1_000_050.0 * 1e6)
"""Unix time of the benches' beginning."""


def timed(work: Job) -> Job:
    return msgspec.structs.replace(work, timeline=True)


def spans(phases: Sequence[Phase]) -> list[tuple[str, float, float]]:
    """(name, start, end) in seconds since the beginning."""
    return [(phase.name, (phase.start_us - BEGAN_US) / 1e6, (phase.end_us - BEGAN_US) / 1e6) for phase in phases]


def told(bench: PrefillBench | DecodeBench) -> list[Phase]:
    """What the router was told since last asked."""
    return [phase for message in bench.take_all(Phases) for phase in message.phases]


def step(bench: PrefillBench | DecodeBench, seconds: float) -> None:
    """One pass whose step takes that long."""
    bench.half.tick()
    output = bench.engine.step()
    bench.now += seconds
    bench.half.after_step(output)


# ---- prefill --------------------------------------------------------------------------------------------------------


def prefill_opened(work: Job) -> PrefillBench:
    """Opened a second before decode joins, two before the first of its two steps."""
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(ROOM, work))
    bench.now += 1.0
    bench.half.handle("decode", Join(ROOM))
    bench.half.handle("decode", Reservation(ROOM, 0))
    bench.now += 1.0
    return bench


def test_prefill_tells_with_its_first_token() -> None:
    bench = prefill_opened(timed(job(PROMPT)))
    step(bench, 3.0)
    assert told(bench) == []
    step(bench, 4.0)
    assert len(bench.tokens) == 1
    assert spans(told(bench)) == [("handshake", 0, 1), ("queue", 0, 2), ("compute", 2, 9)]
    bench.half.handle("decode", Delivered(ROOM))
    assert told(bench) == [], "the rest of its life is decode's to tell"


def test_a_join_after_the_first_token_is_told_when_it_comes() -> None:
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(ROOM, timed(job(PROMPT))))
    bench.run()
    assert [phase.name for phase in told(bench)] == ["queue", "compute"]
    bench.now += 5.0
    bench.half.handle("decode", Join(ROOM))
    assert spans(told(bench)) == [("handshake", 0, 5)]
    bench.half.handle("other", Join(ROOM))
    assert told(bench) == [], "a second join is no second handshake"


def test_a_room_of_one_token_tells_before_it() -> None:
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(ROOM, timed(job(PROMPT, max_tokens=1)), decode=None))
    bench.run()
    assert [phase.name for phase in told(bench)] == ["queue", "compute"]
    assert bench.half.idle


def test_prefill_tells_what_it_knows_when_it_fails() -> None:
    bench = prefill_opened(timed(job(PROMPT)))
    step(bench, 3.0)
    bench.take()
    bench.break_engine("as scripted")
    phases, failed = [message for link, message in bench.take() if link == "router"]
    assert isinstance(phases, Phases)
    assert [phase.name for phase in phases.phases] == ["handshake", "queue"]
    assert isinstance(failed, RoomFailed)


# ---- decode ---------------------------------------------------------------------------------------------------------


def offers_and_handoff(work: Job) -> tuple[PrefillBench, list[Message]]:
    """A prefill half that has computed the room, and what it says."""
    peer = prefill_opened(work)
    peer.run()
    said = [message for _, message in peer.take() if isinstance(message, Offer | Handoff)]
    return peer, sorted(said, key=lambda message: isinstance(message, Handoff))


def decode_received(work: Job) -> DecodeBench:
    """Opened, granted after 1 s, one copy running from 2 s on, the handoff here at 3 s."""
    peer, (*offers, handoff) = offers_and_handoff(work)
    bench = DecodeBench(peer)
    bench.half.handle("router", open_decode(ROOM, work))
    bench.now += 1.0
    bench.half.tick()
    bench.now += 1.0
    for offer in offers:
        bench.half.handle(LINK, offer)  # type: ignore[arg-type]
    bench.now += 1.0
    bench.half.handle(LINK, handoff)  # type: ignore[arg-type]
    bench.take()
    return bench


def copied(bench: DecodeBench, number: int, *, queued: float, seconds: float, corrupt: bool = False) -> None:
    """Copy `number` ends, having taken that long."""
    bench.copies.land((ROOM, number), corrupt=corrupt)
    result = bench.copies.finish((ROOM, number))
    bench.half.fetched(type(result)(**{**vars(result), "queued_seconds": queued, "seconds": seconds}))


def test_decode_tells_before_its_last_token() -> None:
    bench = decode_received(timed(job(PROMPT)))
    assert len(bench.copies.running) == 2
    bench.now += 3.0
    copied(bench, 0, queued=0.5, seconds=1.5)
    copied(bench, 1, queued=1.0, seconds=2.5)
    bench.now += 1.0
    step(bench, 0.25)
    step(bench, 0.25)
    assert told(bench) == []
    step(bench, 0.25)
    phases = told(bench)
    assert spans(phases) == [
        ("queue", 0, 1),
        ("transfer_queue", 2, 2.5),
        ("transfer", 2.5, 4),
        ("transfer_queue", 2, 3),
        ("transfer", 3, 5.5),
        ("admit", 5.5, 7),
        ("first_decode", 7, 7.25),
        ("decode", 7.25, 7.75),
    ]
    copies = [phase for phase in phases if phase.name == PhaseName.TRANSFER]
    assert [(copy.transport, copy.peer, copy.bytes, copy.error) for copy in copies] == [("test", "P", 2, "")] * 2
    assert bench.half.idle


def test_a_handoff_that_comes_last_is_what_admission_waits_for() -> None:
    work = timed(job(PROMPT, max_tokens=2))
    peer, (*offers, handoff) = offers_and_handoff(work)
    bench = DecodeBench(peer)
    bench.half.handle("router", open_decode(ROOM, work))
    bench.half.tick()
    for offer in offers:
        bench.half.handle(LINK, offer)  # type: ignore[arg-type]
    bench.copy_all()
    bench.now += 6.0
    bench.half.handle(LINK, handoff)  # type: ignore[arg-type]
    step(bench, 0.5)
    assert spans(told(bench))[-2:] == [("admit", 6, 6), ("first_decode", 6, 6.5)], "and no decode after one token"


def test_a_failed_copy_is_told_with_its_error_before_the_failure() -> None:
    bench = decode_received(timed(job(PROMPT)))
    copied(bench, 0, queued=0.5, seconds=0.25, corrupt=True)
    phases, failed = [message for link, message in bench.take() if link == "router"]
    assert isinstance(phases, Phases)
    copy = phases.phases[-1]
    assert (copy.name, copy.bytes, copy.error) == ("transfer", 0, "a checksum is wrong")
    assert isinstance(failed, RoomFailed)
    assert failed.code is FailureCode.TRANSFER_FAILED


def test_a_revoked_reservation_queues_twice() -> None:
    work = timed(job(PROMPT))
    peer, (*_, handoff) = offers_and_handoff(timed(job(PROMPT)))
    bench = DecodeBench(peer, pages=6, lease_s=2.0)
    other = Room("b", 0)
    bench.half.handle("router", open_decode(ROOM, work))
    bench.half.tick()
    bench.half.handle("router", open_decode(other, job(PROMPT)))
    bench.half.handle(LINK, msgspec.structs.replace(handoff, room=other))  # type: ignore[arg-type]
    bench.wait(3.0)
    assert bench.half.counters.revocations == 1
    bench.wait(1.0)
    bench.break_engine("as scripted")
    assert [name for name, _, _ in spans(told(bench))] == ["queue"], "the second wait was not over"


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_a_half_that_generates_from_the_start_has_queue_compute_and_decode(max_tokens: int) -> None:
    peer = PrefillBench()
    bench = DecodeBench(peer, engine={"chunked_prefill_size": 4})
    bench.half.handle("router", open_generate(ROOM, timed(job(PROMPT, max_tokens=max_tokens))))
    bench.now += 1.0
    for _ in range(1 + max_tokens):
        step(bench, 0.5)
    expected = [("queue", 0, 1), ("compute", 1, 2), ("decode", 2, 3)]
    assert spans(told(bench)) == expected[: 2 if max_tokens == 1 else 3]


# ---- asked or not, and on the wire ----------------------------------------------------------------------------------


def test_rooms_that_do_not_ask_have_no_timeline() -> None:
    bench = decode_received(job(PROMPT))
    assert bench.half.rooms[ROOM].timeline is None
    bench.copy_all()
    bench.run()
    assert told(bench) == []
    peer = prefill_opened(job(PROMPT))
    assert peer.half.rooms[ROOM].timeline is None
    peer.run()
    assert told(peer) == []


def test_phases_survive_the_wire() -> None:
    message = Phases(ROOM, [Phase("transfer", 1, 2, "shm", "P", 4096)])
    assert decode_body(encode_frame(message)[4:]) == message


def test_jobs_of_routers_that_know_less_or_more_are_understood() -> None:
    """Who does not send the flag, nor what came after it, asks for nothing; who does not know it reads the rest."""
    fields = msgspec.to_builtins(timed(job(PROMPT)))
    assert msgspec.convert(fields[: Job.__struct_fields__.index("timeline")], Job) == job(PROMPT)
    assert msgspec.convert([*fields, "of a later version"], Job) == timed(job(PROMPT))


def test_a_log_uses_the_attempt_in_which_its_thread_kept_its_turn() -> None:
    """Between the first two readings of the clocks 4 s pass, between the others nothing."""
    clock = iter([10.0, 14.0, 14.0, 14.0, 14.0, 14.0])
    unix = iter([104.0, 104.0, 104.0])
    log = PhaseLog(lambda: next(clock), lambda: next(unix))
    log.add(PhaseName.QUEUE, 14.0, 15.0)
    assert [(phase.start_us, phase.end_us) for phase in log.take()] == [(104_000_000, 105_000_000)]
    assert log.take() == []
