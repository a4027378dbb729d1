"""The prefill half alone: what it offers, whom it tells, what it holds back, and that it lets go of everything."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from prefill.counters import PrefillStage
from prefill.table import PREFILL_TABLE, PrefillEvent, PrefillState
from protocol.room_memory import MemoryLimits
from protocol.rooms import (
    Abort,
    AbortReason,
    Closed,
    Delivered,
    FailureCode,
    Handoff,
    Join,
    Message,
    Offer,
    Reservation,
    Room,
    RoomFailed,
)
from protocol.sampling import FinishReason
from protocol.transitions import IllegalMove
from tests.unit.rooms.bench import PrefillBench, job, open_prefill
from tests.unit.rooms.copies import pool_checksums
from tests.unit.toy_model import ToyLimits, toy_generate

ROOM = Room("a", 0)
PROMPT = [3, 1, 4, 1, 5, 9, 2]
"""Four pages of two tokens, the last half full; two steps of four tokens."""
MESSAGES = (
    PrefillEvent.OPEN,
    PrefillEvent.JOIN,
    PrefillEvent.RESERVATION,
    PrefillEvent.DELIVERED,
    PrefillEvent.ABORT,
    PrefillEvent.PEER_ABORT,
)


def opened(**bench: object) -> PrefillBench:
    """A bench with `ROOM` open and joined, reserved with nothing held."""
    made = PrefillBench(**bench)  # type: ignore[arg-type]
    made.half.handle("router", open_prefill(ROOM, job(PROMPT)))
    made.half.handle("decode", Join(ROOM))
    made.half.handle("decode", Reservation(ROOM, 0))
    return made


def offered(messages: Sequence[Offer]) -> list[range]:
    return [range(offer.first, offer.first + len(offer.pages)) for offer in messages]


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", PrefillState)
@pytest.mark.parametrize("event", MESSAGES)
def test_every_message_has_a_move_in_every_state(state: PrefillState, event: PrefillEvent) -> None:
    assert (state, event) in PREFILL_TABLE


def test_what_cannot_happen_is_refused() -> None:
    with pytest.raises(IllegalMove, match="LEASE_OVER cannot happen to a room that is COMPUTING"):
        PREFILL_TABLE.move(PrefillState.COMPUTING, PrefillEvent.LEASE_OVER)


# ---- the plain way --------------------------------------------------------------------------------------------------


def test_chunks_are_offered_as_they_are_computed_and_the_token_goes_out_first() -> None:
    bench = opened()
    bench.run_pass()
    first = bench.take_all(Offer)
    assert offered(first) == [range(2)], "whole pages of the first chunk"
    assert bench.tokens == []
    bench.run_pass()
    (link, event), *others = bench.tokens
    assert not others
    assert (link, event.position, event.token, event.finish) == ("router", 0, toy_generate(PROMPT, 1)[0], None)
    assert event.cached_tokens == 0
    messages = [message for _, message in bench.take()]
    second = [message for message in messages if isinstance(message, Offer)]
    assert offered(second) == [range(2, 4)], "the half full page too, now that the prompt is done"
    assert [message for message in messages if isinstance(message, Handoff)] == [
        Handoff(ROOM, event.token, 0, 4, computed_at=bench.unix_time())
    ]
    assert bench.half.rooms[ROOM].state is PrefillState.RETAINED
    pages = [page for offer in first + second for page in offer.pages]
    assert pages == bench.half.rooms[ROOM].request.pages[:4]
    assert [each for offer in first + second for each in offer.checksums] == pool_checksums(bench.engine.pool, pages)

    bench.half.handle("decode", Delivered(ROOM))
    assert bench.half.idle
    assert bench.engine.audit().idle
    assert bench.half.counters.delivered == 1
    assert bench.stages == [PrefillStage.QUEUED, PrefillStage.FIRST_TOKEN, PrefillStage.RETAINED]
    assert bench.half.next_deadline() is None


def test_a_late_join_gets_everything_at_once() -> None:
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT)))
    bench.run()
    assert bench.take() == []
    bench.half.handle("decode", Join(ROOM))
    bench.half.tick()
    messages = bench.take()
    assert [type(message) for _, message in messages] == [Handoff, Offer]
    assert offered([message for _, message in messages if isinstance(message, Offer)]) == [range(4)]


def test_pages_that_decode_holds_are_not_offered_until_it_no_longer_holds_them() -> None:
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT)))
    bench.half.handle("decode", Join(ROOM))
    bench.half.handle("decode", Reservation(ROOM, 3))
    bench.run()
    assert offered(bench.take_all(Offer)) == [range(3, 4)]
    bench.half.handle("decode", Reservation(ROOM, 1))
    bench.half.tick()
    assert offered(bench.take_all(Offer)) == [range(1, 3)], "the reservation was revoked and made anew"


def test_a_join_and_a_reservation_in_one_pass_cost_one_offer() -> None:
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT)))
    bench.run()
    bench.half.handle("decode", Join(ROOM))
    bench.half.handle("decode", Reservation(ROOM, 2))
    bench.half.tick()
    assert offered(bench.take_all(Offer)) == [range(2, 4)]


def test_joined_again_over_another_link_everything_is_offered_there() -> None:
    bench = opened()
    bench.run()
    bench.take()
    bench.half.handle("decode", Join(ROOM))
    bench.half.tick()
    assert bench.half.counters.messages.duplicates == 1
    assert [type(message) for _, message in bench.take()] == [Handoff]
    bench.half.handle("decode again", Join(ROOM))
    bench.half.tick()
    assert [(link, type(message)) for link, message in bench.take()] == [
        ("decode again", Handoff),
        ("decode again", Offer),
    ]
    bench.half.link_lost("decode")
    assert ROOM in bench.half.rooms


def test_logged_tokens_are_computed_as_part_of_the_prompt() -> None:
    answer = toy_generate(PROMPT, 4)
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT, logged=answer[:3])))
    bench.half.handle("decode", Join(ROOM))
    bench.run()
    (_, event), *_ = bench.tokens
    assert (event.position, event.token, event.finish) == (3, answer[3], FinishReason.LENGTH)


def test_logged_tokens_move_the_handoff() -> None:
    answer = toy_generate(PROMPT, 3)
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT, max_tokens=6, logged=answer[:2])))
    bench.half.handle("decode", Join(ROOM))
    bench.run()
    messages = [message for _, message in bench.take()]
    assert Handoff(ROOM, answer[2], 2, 5, computed_at=bench.unix_time()) in messages


def test_without_verification_offers_have_no_checksums() -> None:
    bench = opened(checksums=False)
    bench.run()
    assert all(offer.checksums == [] for offer in bench.take_all(Offer))


def test_what_the_cache_has_is_offered_with_the_first_chunk() -> None:
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(Room("before", 0), job(PROMPT), decode=None))
    bench.run()
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT)))
    bench.half.handle("decode", Join(ROOM))
    bench.run()
    assert offered(bench.take_all(Offer)) == [range(4)]
    assert bench.tokens[-1][1].cached_tokens == 6


# ---- rooms that end at their first token ----------------------------------------------------------------------------


def test_a_first_token_that_ends_the_sequence_ends_both_halves() -> None:
    token = toy_generate(PROMPT, 1)[0]
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT, stop_token_ids=(token,))))
    bench.half.handle("decode", Join(ROOM))
    bench.run()
    assert bench.tokens[0][1].finish is FinishReason.STOP_TOKEN
    assert ("decode", Abort(ROOM, AbortReason.FINISHED_EARLY)) in bench.take()
    assert bench.half.idle
    assert bench.engine.audit().idle
    bench.half.handle("late decode", Join(ROOM))
    assert bench.take() == [("late decode", Abort(ROOM, AbortReason.FINISHED_EARLY))]


def test_a_room_without_a_decode_half_ends_at_its_only_token() -> None:
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT, max_tokens=1), decode=None))
    bench.run()
    assert [event.finish for _, event in bench.tokens] == [FinishReason.LENGTH]
    assert bench.take() == []
    assert bench.half.idle
    assert bench.engine.audit().idle


def test_a_room_wrongly_opened_without_a_decode_half_is_given_up() -> None:
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT, max_tokens=2), decode=None))
    bench.run()
    assert len(bench.tokens) == 1
    (failed,) = bench.take_all(RoomFailed)
    assert failed.code is FailureCode.INTERNAL
    assert "without a decode half" in failed.detail
    assert bench.engine.audit().idle


# ---- ahead of reservations ------------------------------------------------------------------------------------------


def test_rooms_are_computed_ahead_up_to_a_share_and_then_when_reserved() -> None:
    bench = PrefillBench(pages=16, ahead_share=0.5)
    rooms = [Room(name, 0) for name in "abc"]
    for index, room in enumerate(rooms):
        bench.half.handle("router", open_prefill(room, job([index + 10, *PROMPT[1:]])))
        bench.half.handle("decode", Join(room))
    bench.run()
    assert [bench.half.rooms[room].state.name for room in rooms] == ["RETAINED", "RETAINED", "WAITING"]
    assert bench.half.num_waiting == 1
    bench.half.handle("decode", Reservation(rooms[2], 0))
    bench.run()
    assert bench.half.rooms[rooms[2]].state is PrefillState.RETAINED


def test_the_share_goes_to_the_highest_priority() -> None:
    bench = PrefillBench(pages=16, ahead_share=0.25)
    for index, (name, priority) in enumerate((("plain", 0), ("high", 1))):
        work = msgspec.structs.replace(job([index + 10, *PROMPT[1:]]), priority=priority)
        bench.half.handle("router", open_prefill(Room(name, 0), work))
    bench.run()
    states = {room.request_id: record.state.name for room, record in bench.half.rooms.items()}
    assert states == {"plain": "WAITING", "high": "RETAINED"}


def test_reserving_one_room_makes_space_for_another() -> None:
    bench = PrefillBench(pages=16, ahead_share=0.25)
    for index, name in enumerate("ab"):
        bench.half.handle("router", open_prefill(Room(name, 0), job([index + 10, *PROMPT[1:]])))
    bench.run()
    assert bench.half.num_waiting == 1
    bench.half.handle("decode", Reservation(Room("a", 0), 0))
    bench.run()
    assert bench.half.num_waiting == 0


def test_a_room_that_does_not_fit_stops_none_that_does_until_it_is_old() -> None:
    bench = PrefillBench(pages=16, ahead_share=0.5, ageing_s=5.0)
    bench.half.handle("router", open_prefill(Room("first", 0), job([1] * 8)))
    bench.half.handle("router", open_prefill(Room("large", 0), job([2] * 10)))
    bench.half.handle("router", open_prefill(Room("small", 0), job([3] * 6)))
    bench.run()
    states = {room.request_id: record.state.name for room, record in bench.half.rooms.items()}
    assert states == {"first": "RETAINED", "large": "WAITING", "small": "RETAINED"}
    bench.half.handle("decode", Reservation(Room("small", 0), 0))
    bench.wait(5.0)
    bench.half.handle("router", open_prefill(Room("later", 0), job([4] * 6)))
    bench.run()
    assert bench.half.rooms[Room("later", 0)].state is PrefillState.WAITING, "it waits for the one that is old"
    bench.half.handle("decode", Reservation(Room("first", 0), 0))
    bench.run()
    assert bench.half.rooms[Room("large", 0)].state is PrefillState.RETAINED


def test_a_room_larger_than_the_share_waits_for_its_reservation_and_stops_nobody() -> None:
    bench = PrefillBench(pages=16, ahead_share=0.25, ageing_s=1.0)
    bench.half.handle("router", open_prefill(Room("large", 0), job([2] * 12)))
    bench.wait(3.0)
    bench.half.handle("router", open_prefill(Room("small", 0), job([3] * 6)))
    bench.half.handle("router", open_prefill(Room("single", 0), job([4] * 12, max_tokens=1), decode=None))
    bench.run()
    states = {room.request_id: record.state.name for room, record in bench.half.rooms.items()}
    assert states == {"large": "WAITING", "small": "RETAINED"}
    assert len(bench.tokens) == 2


# ---- early, late and repeated messages ------------------------------------------------------------------------------


def test_a_join_before_the_open_waits_for_it() -> None:
    bench = PrefillBench()
    bench.half.handle("decode", Join(ROOM))
    bench.half.handle("decode", Reservation(ROOM, 1))
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT)))
    bench.run()
    assert offered(bench.take_all(Offer)) == [range(1, 2), range(2, 4)]
    assert bench.half.counters.messages.parked == 2
    assert bench.half.counters.messages.dropped_parked == 0


def test_a_join_whose_open_never_comes_is_turned_away() -> None:
    bench = PrefillBench(limits=MemoryLimits(parked_s=10.0))
    bench.half.handle("decode", Join(ROOM))
    bench.half.handle("decode", Reservation(ROOM, 1))
    assert bench.half.next_deadline() == bench.now + 10.0
    bench.wait(10.0)
    assert bench.take() == [("decode", Abort(ROOM, AbortReason.NEVER_OPENED))]
    assert bench.half.counters.messages.dropped_parked == 2
    assert bench.half.next_deadline() is None


def test_parking_is_bounded() -> None:
    bench = PrefillBench(limits=MemoryLimits(max_parked=2))
    for name in "abc":
        bench.half.handle("decode", Join(Room(name, 0)))
    assert bench.take() == [("decode", Abort(Room("c", 0), AbortReason.NEVER_OPENED))]
    bench.half.link_lost("decode")
    assert bench.half.counters.messages.dropped_parked == 3
    bench.half.handle("decode again", Join(Room("d", 0)))
    assert bench.take() == []


def test_an_abort_before_the_open_refuses_it_and_answers_what_is_parked() -> None:
    bench = PrefillBench()
    bench.half.handle("decode", Join(ROOM))
    bench.half.handle("router", Abort(ROOM, AbortReason.CLIENT_GONE))
    assert bench.take() == [("decode", Abort(ROOM, AbortReason.CLIENT_GONE)), ("router", Closed(ROOM))]
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT)))
    (failed,) = bench.take_all(RoomFailed)
    assert failed.code is FailureCode.REFUSED
    assert bench.half.counters.messages.tombstone_hits == 1
    assert bench.half.idle


def test_a_repeated_open_is_counted_whether_the_room_lives_or_not() -> None:
    bench = opened()
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT)))
    bench.run()
    bench.half.handle("decode", Delivered(ROOM))
    bench.take()
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT)))
    assert bench.take() == []
    assert bench.half.idle
    assert bench.half.counters.messages.duplicates == 2


def test_tombstones_are_bounded_and_end_some_time_after_the_deadline() -> None:
    bench = PrefillBench(limits=MemoryLimits(max_tombstones=2, tombstone_s=30.0))
    for name in "abc":
        bench.half.handle("router", Abort(Room(name, 0), AbortReason.CLIENT_GONE))
    assert not bench.half.knows(Room("a", 0))
    assert bench.half.knows(Room("b", 0))
    bench.wait(30.0)
    assert not bench.half.knows(Room("b", 0))


def test_a_newer_epoch_closes_the_older_and_makes_its_messages_stale() -> None:
    bench = opened()
    bench.run()
    bench.take()
    newer = Room("a", 1)
    bench.half.handle("router 2", open_prefill(newer, job(PROMPT)))
    assert bench.take() == [("decode", Abort(ROOM, AbortReason.SUPERSEDED))]
    assert list(bench.half.rooms) == [newer]
    late: list[Message] = [Reservation(ROOM, 0), Delivered(ROOM), Join(ROOM), Abort(ROOM, AbortReason.CLIENT_GONE)]
    for message in late:
        bench.half.handle("decode", message)  # type: ignore[arg-type]
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT)))
    assert bench.half.counters.messages.stale_messages == 5
    answers = [message for _, message in bench.take()]
    assert answers[:2] == [Abort(ROOM, AbortReason.SUPERSEDED), Closed(ROOM)]
    assert isinstance(answers[2], RoomFailed)
    assert list(bench.half.rooms) == [newer]


def test_a_join_of_a_newer_epoch_is_enough_to_close_the_older() -> None:
    bench = opened()
    bench.run()
    bench.take()
    bench.half.handle("decode", Join(Room("a", 1)))
    assert bench.half.idle
    assert bench.engine.audit().idle
    bench.half.handle("decode", Join(Room("a", 2)))
    assert bench.take()[1:] == [("decode", Abort(Room("a", 1), AbortReason.SUPERSEDED))]


# ---- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("router aborts", [("router", "Closed"), ("decode", "client_gone")]),
        ("decode aborts", [("decode", "Closed")]),
        ("router lost", [("decode", "client_gone")]),
        ("decode lost", [("router", "peer_lost")]),
        ("deadline", [("router", "deadline"), ("decode", "deadline")]),
        ("engine broken", [("router", "internal"), ("decode", "peer_failed")]),
    ],
)
def test_every_end_gives_the_pages_back_and_tells_who_must_know(
    passes: int, end: str, told: list[tuple[str, str]]
) -> None:
    bench = opened(lease_s=1000.0)
    for _ in range(passes):
        bench.run_pass()
    bench.take()
    match end:
        case "router aborts":
            bench.half.handle("router", Abort(ROOM, AbortReason.CLIENT_GONE))
        case "decode aborts":
            bench.half.handle("decode", Abort(ROOM, AbortReason.TRANSFER_FAILED))
        case "router lost":
            bench.half.link_lost("router")
        case "decode lost":
            bench.half.link_lost("decode")
        case "deadline":
            assert bench.half.next_deadline() == bench.now + 60.0
            bench.wait(60.0)
        case "engine broken":
            bench.break_engine("out of memory")
    heard = []
    for link, message in bench.take():
        match message:
            case Closed():
                heard.append((link, "Closed"))
            case Abort(_, reason):
                heard.append((link, reason.value))
            case RoomFailed(_, code, detail):
                heard.append((link, code.value))
                assert detail
    assert heard == told
    assert bench.half.idle
    assert bench.engine.audit().idle
    assert bench.half.next_deadline() is None
    tokens = len(bench.tokens)
    bench.run_pass()
    assert len(bench.tokens) == tokens
    bench.half.handle("router", Abort(ROOM, AbortReason.CLIENT_GONE))
    assert bench.take() == [("router", Closed(ROOM))]


def test_the_lease_ends_and_a_reservation_begins_it_anew() -> None:
    bench = PrefillBench(lease_s=10.0)
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT)))
    bench.half.handle("decode", Join(ROOM))
    bench.run()
    assert bench.half.next_deadline() == bench.now + 10.0
    bench.wait(9.0)
    bench.half.handle("decode", Reservation(ROOM, 0))
    bench.wait(9.0)
    bench.take()
    assert ROOM in bench.half.rooms
    bench.wait(1.0)
    failed, abort = bench.take()
    assert isinstance(failed[1], RoomFailed)
    assert failed[1].code is FailureCode.LEASE_EXPIRED
    assert abort == ("decode", Abort(ROOM, AbortReason.PEER_FAILED))
    assert bench.engine.audit().idle


def test_a_failing_step_reaches_router_and_decode() -> None:
    bench = opened()
    bench.model.fail_at.add(1)
    bench.run_pass()
    failed, abort = bench.take()
    assert isinstance(failed[1], RoomFailed)
    assert failed[1].code is FailureCode.INTERNAL
    assert "told to fail" in failed[1].detail
    assert abort == ("decode", Abort(ROOM, AbortReason.PEER_FAILED))
    assert bench.engine.audit().idle


def test_a_prompt_that_can_never_fit_is_said_to_be_too_long() -> None:
    bench = PrefillBench(engine={"limits": ToyLimits(max_position_embeddings=8)})
    bench.half.handle("router", open_prefill(ROOM, job([1] * 9)))
    bench.half.tick()
    (failed,) = bench.take_all(RoomFailed)
    assert failed.code is FailureCode.TOO_LONG
    assert "9 tokens" in failed.detail


def test_a_prompt_larger_than_pool_and_share_is_not_kept_waiting() -> None:
    bench = PrefillBench(pages=8)
    bench.half.handle("router", open_prefill(ROOM, job([1] * 20)))
    bench.half.tick()
    (failed,) = bench.take_all(RoomFailed)
    assert failed.code is FailureCode.TOO_LONG


def test_an_empty_prompt_is_refused_in_words() -> None:
    bench = PrefillBench()
    bench.half.handle("router", open_prefill(ROOM, job([])))
    (failed,) = bench.take_all(RoomFailed)
    assert failed.code is FailureCode.INTERNAL
    assert "empty" in failed.detail


def test_draining_refuses_new_rooms_and_finishes_old_ones() -> None:
    bench = opened()
    bench.half.drain()
    bench.half.handle("router", open_prefill(Room("b", 0), job(PROMPT)))
    (failed,) = bench.take_all(RoomFailed)
    assert failed.code is FailureCode.DRAINING
    bench.half.handle("decode", Join(Room("b", 0)))
    assert bench.take() == [("decode", Abort(Room("b", 0), AbortReason.DRAINING))]
    assert not bench.half.idle
    bench.run()
    bench.half.handle("decode", Delivered(ROOM))
    assert bench.half.idle
