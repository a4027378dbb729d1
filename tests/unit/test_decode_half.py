"""The decode half alone, against a real prefill half: grants, copies, admission, quarantine, and every way to end."""

from __future__ import annotations

import msgspec
import pytest

from decode.counters import DecodeStage
from decode.table import DECODE_TABLE, DecodeAction, DecodeEvent, DecodeState
from protocol.rooms import (
    Abort,
    AbortReason,
    Closed,
    Delivered,
    FailureCode,
    Handoff,
    Job,
    Join,
    Message,
    Offer,
    Reservation,
    Room,
    RoomFailed,
)
from protocol.sampling import FinishReason
from protocol.transitions import IllegalMove, Move
from tests.unit.rooms.bench import (
    PREFILL,
    DecodeBench,
    PrefillBench,
    job,
    open_decode,
    open_generate,
    open_prefill,
)
from tests.unit.toy_model import ToyLimits, toy_generate

ROOM = Room("a", 0)
PROMPT = [3, 1, 4, 1, 5, 9, 2]
"""Four pages of two tokens, the last half full."""
ANSWER = toy_generate(PROMPT, 4)
LINK = "prefill#1"
MESSAGES = (
    DecodeEvent.OPEN_DECODE,
    DecodeEvent.OPEN_GENERATE,
    DecodeEvent.OFFER,
    DecodeEvent.HANDOFF,
    DecodeEvent.ABORT,
    DecodeEvent.PEER_ABORT,
    DecodeEvent.NEVER_OPENED,
)


class Pair:
    """A prefill half that really computes, and the decode half under test."""

    def __init__(self, *, pages: int = 16, engine: dict[str, object] | None = None, **decode: object) -> None:
        self.prefill = PrefillBench(pages=64, lease_s=1000.0)
        self.decode = DecodeBench(self.prefill, pages=pages, engine=engine, **decode)
        self.half = self.decode.half

    def open(self, room: Room = ROOM, work: Job | None = None, *, ttl_ms: int = 60_000) -> None:
        """Open the decode half alone."""
        self.half.handle("router", open_decode(room, work or job(PROMPT), ttl_ms=ttl_ms))
        self.half.tick()

    def compute(self, room: Room = ROOM, work: Job | None = None, *, held: int = 0) -> list[Message]:
        """What prefill has to say about the room when it has computed it, for a decode half that holds `held` pages."""
        half = self.prefill.half
        half.handle("router", open_prefill(room, work or job(PROMPT)))
        half.handle("decode", Join(room))
        half.handle("decode", Reservation(room, held))
        self.prefill.run()
        return [message for _, message in self.prefill.take() if isinstance(message, Offer | Handoff)]

    def hear(self, messages: list[Message]) -> None:
        """Deliver what prefill says."""
        for message in messages:
            self.half.handle(LINK, message)  # type: ignore[arg-type]
        self.half.tick()

    def tokens(self) -> list[int]:
        return [event.token for _, event in self.decode.tokens]

    def assert_clean(self) -> None:
        assert self.half.idle
        assert self.decode.engine.audit().idle
        assert self.half.next_deadline() is None


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", DecodeState)
@pytest.mark.parametrize("event", MESSAGES)
def test_every_message_has_a_move_in_every_state(state: DecodeState, event: DecodeEvent) -> None:
    assert (state, event) in DECODE_TABLE


def test_a_token_only_goes_out_as_the_half_takes_for_granted() -> None:
    assert DECODE_TABLE.move(DecodeState.RUNNING, DecodeEvent.TOKEN) == Move((DecodeAction.EMIT,), DecodeState.RUNNING)


def test_what_cannot_happen_is_refused() -> None:
    with pytest.raises(IllegalMove, match="REVOKED cannot happen to a room that is RUNNING"):
        DECODE_TABLE.move(DecodeState.RUNNING, DecodeEvent.REVOKED)


# ---- the plain way --------------------------------------------------------------------------------------------------


def test_a_room_is_joined_reserved_copied_admitted_and_finished() -> None:
    pair = Pair()
    pair.open()
    assert pair.decode.connects == [PREFILL]
    assert pair.decode.take() == [(LINK, Join(ROOM)), (LINK, Reservation(ROOM, 0))]
    *offers, handoff = sorted(pair.compute(), key=lambda message: isinstance(message, Handoff))
    pair.hear(offers)
    assert len(pair.decode.copies.running) == len(offers) == 2, "one copy for each batch of pages"
    assert pair.half.landing() == set(), "the handoff is not here"
    pair.hear([handoff])
    assert pair.half.landing() == {ROOM}
    pair.decode.copy((ROOM, 0))
    assert pair.half.rooms[ROOM].state is DecodeState.RECEIVING
    assert pair.decode.take() == []
    assert pair.half.landing() == {ROOM}
    pair.decode.copy((ROOM, 1))
    assert pair.half.rooms[ROOM].state is DecodeState.RUNNING
    assert pair.half.landing() == set()
    assert pair.decode.take() == [(LINK, Delivered(ROOM))]
    pair.decode.run()
    assert pair.tokens() == ANSWER[1:]
    events = [event for _, event in pair.decode.tokens]
    assert [event.position for event in events] == [1, 2, 3]
    assert [event.finish for event in events] == [None, None, FinishReason.LENGTH]
    assert [event.cached_tokens for event in events] == [0, None, None]
    pair.assert_clean()
    counters = pair.half.counters
    assert (counters.opened, counters.granted, counters.admitted, counters.finished) == (1, 1, 1, 1)
    assert (counters.fetches, counters.fetched_pages) == (2, 4)
    assert set(pair.decode.stages) == set(DecodeStage)
    ((peer, transport, traffic),) = pair.half.traffic.by_peer()
    assert (peer, transport, traffic.copies, traffic.failures) == (PREFILL, "test", 2, 0)
    pair.half.link_lost(LINK)
    assert not list(pair.half.traffic.by_peer())
    assert pair.half.traffic.by_transport["test"].copies == 2


def test_a_handover_from_a_host_whose_clock_is_ahead_took_no_time_rather_than_less() -> None:
    pair = Pair()
    pair.open()
    for message in pair.compute():
        ahead = isinstance(message, Handoff)
        pair.hear([msgspec.structs.replace(message, computed_at=message.computed_at + 60) if ahead else message])
    for number in (0, 1):
        pair.decode.copy((ROOM, number))
    assert pair.decode.stages[-1] is DecodeStage.HANDOVER  # and none was negative, which its bench would refuse
    pair.decode.run()
    pair.assert_clean()


def test_one_link_serves_all_rooms_of_a_replica_until_it_is_lost() -> None:
    pair = Pair()
    pair.open(Room("a", 0))
    pair.open(Room("b", 0), job([9, *PROMPT]))
    assert pair.decode.connects == [PREFILL]
    pair.half.link_lost(LINK)
    pair.assert_clean()
    pair.open(Room("a", 1))
    assert pair.decode.connects == [PREFILL, PREFILL]
    assert pair.half.rooms[Room("a", 1)].prefill == "prefill#2"


def test_offers_before_the_grant_are_taken_in_one_copy() -> None:
    pair = Pair(pages=6)
    pair.half.handle("router", open_generate(Room("other", 0), job([8] * 7, max_tokens=3)))
    pair.decode.run_pass()
    pair.open()
    assert pair.half.num_waiting == 1
    pair.hear(pair.compute())
    assert not pair.decode.copies.running
    pair.decode.run()
    assert pair.half.rooms[ROOM].state is DecodeState.RECEIVING
    assert len(pair.decode.copies.running) == 1
    pair.decode.copy_all()
    pair.decode.run()
    assert pair.tokens()[-3:] == ANSWER[1:]


def test_pages_in_the_prefix_cache_are_not_copied() -> None:
    pair = Pair()
    pair.half.handle("router", open_generate(Room("before", 0), job(PROMPT)))
    pair.decode.run()
    pair.decode.take()
    pair.open()
    assert pair.decode.take()[1:] == [(LINK, Reservation(ROOM, 3))]
    pair.hear(pair.compute(held=3))
    (copy,) = pair.decode.copies.running.values()
    assert len(copy.job.target_pages) == 1
    pair.decode.copy_all()
    pair.decode.run()
    assert pair.tokens()[-3:] == ANSWER[1:]
    assert pair.half.counters.held_pages == 3
    assert pair.decode.tokens[-3][1].cached_tokens == 6


def test_a_prompt_that_is_cached_whole_needs_the_handoff_alone() -> None:
    pair = Pair()
    pair.half.handle("router", open_generate(Room("before", 0), job(PROMPT)))
    pair.decode.run()
    pair.decode.take()
    prompt = PROMPT[:6]
    pair.open(work=job(prompt))
    pair.hear([Handoff(ROOM, toy_generate(prompt, 1)[0], 0, 3)])
    assert pair.half.rooms[ROOM].state is DecodeState.RUNNING
    assert pair.half.counters.fetches == 0
    pair.decode.run()
    assert pair.tokens()[-3:] == toy_generate(prompt, 4)[1:]


def test_a_handoff_before_its_offers_admits_when_the_last_page_lands() -> None:
    pair = Pair()
    pair.open()
    messages = sorted(pair.compute(), key=lambda message: isinstance(message, Offer))
    assert isinstance(messages[0], Handoff)
    pair.hear(messages[:2])
    assert pair.half.landing() == set(), "an offer is missing"
    pair.hear(messages[2:])
    assert pair.half.landing() == {ROOM}
    pair.decode.copy_all()
    pair.decode.run()
    assert pair.tokens() == ANSWER[1:]


def test_logged_tokens_belong_to_the_prompt() -> None:
    work = job(PROMPT, logged=ANSWER[:2])
    pair = Pair()
    pair.open(work=work)
    pair.hear(pair.compute(work=work))
    pair.decode.copy_all()
    pair.decode.run()
    assert [(event.position, event.token) for _, event in pair.decode.tokens] == [(3, ANSWER[3])]


def test_a_generating_room_goes_on_after_what_is_logged() -> None:
    pair = Pair()
    pair.half.handle("router", open_generate(ROOM, job(PROMPT, logged=ANSWER[:2])))
    pair.decode.run()
    assert [(event.position, event.token) for _, event in pair.decode.tokens] == [(2, ANSWER[2]), (3, ANSWER[3])]
    assert pair.decode.tokens[0][1].cached_tokens == 0
    pair.assert_clean()


def test_repeated_offers_and_handoffs_change_nothing() -> None:
    pair = Pair()
    pair.open()
    messages = pair.compute()
    pair.hear(messages)
    pair.hear(messages)
    assert len(pair.decode.copies.running) == 2
    assert pair.half.counters.messages.duplicates == 1, "the handoff; offers may be repeated"
    pair.decode.copy_all()
    pair.hear(messages)
    assert pair.half.counters.messages.stale_messages == 3
    pair.decode.run()
    assert pair.tokens() == ANSWER[1:]


# ---- grants ---------------------------------------------------------------------------------------------------------


def test_computed_rooms_are_granted_first_and_the_rest_by_age() -> None:
    pair = Pair(pages=8)
    blocker = Room("blocker", 0)
    pair.half.handle("router", open_generate(blocker, job([8] * 13, max_tokens=2)))
    pair.decode.run_pass()
    for name in "abc":
        pair.open(Room(name, 0), job([ord(name) - 90, *PROMPT[1:]]))
    pair.hear(pair.compute(Room("c", 0), job([ord("c") - 90, *PROMPT[1:]])))
    assert pair.half.num_waiting == 3
    pair.decode.run()
    states = {room.request_id: record.state.name for room, record in pair.half.rooms.items()}
    assert states == {"a": "QUEUED", "b": "QUEUED", "c": "RECEIVING"}
    pair.decode.copy_all()
    pair.decode.run()
    states = {room.request_id: record.state.name for room, record in pair.half.rooms.items()}
    assert states == {"a": "RECEIVING", "b": "QUEUED"}


def test_a_room_that_does_not_fit_stops_none_that_does_until_it_is_old() -> None:
    pair = Pair(pages=12, ageing_s=5.0)
    pair.open(Room("first", 0), job([1] * 10))
    pair.open(Room("large", 0), job([2] * 16))
    pair.open(Room("small", 0), job([3] * 4))
    states = {room.request_id: record.state.name for room, record in pair.half.rooms.items()}
    assert states == {"first": "RECEIVING", "large": "QUEUED", "small": "RECEIVING"}
    pair.half.handle("router", Abort(Room("small", 0), AbortReason.CLIENT_GONE))
    pair.decode.wait(5.0)
    pair.open(Room("later", 0), job([4] * 4))
    assert pair.half.rooms[Room("later", 0)].state is DecodeState.QUEUED, "it waits for the one that is old"
    pair.half.handle("router", Abort(Room("first", 0), AbortReason.CLIENT_GONE))
    pair.half.tick()
    assert pair.half.rooms[Room("large", 0)].state is DecodeState.RECEIVING


def test_a_still_reservation_is_taken_back_for_a_computed_room_after_its_lease() -> None:
    pair = Pair(pages=8, lease_s=3.0)
    still, computed = Room("still", 0), Room("computed", 0)
    work = job([7, *PROMPT[1:]], max_tokens=8)
    pair.open(still, job([6] * 9))
    pair.open(computed, work)
    pair.decode.take()
    assert pair.half.rooms[computed].state is DecodeState.QUEUED
    pair.decode.wait(10.0)
    assert pair.half.counters.revocations == 0, "nobody waits whose KV is there"
    pair.hear(pair.compute(computed, work))
    assert pair.half.counters.revocations == 1
    assert pair.half.rooms[still].state is DecodeState.QUEUED
    assert pair.decode.take() == [(LINK, Reservation(computed, 0))]
    pair.decode.copy_all()
    pair.decode.run()
    assert pair.tokens() == toy_generate(work.prompt, 8)[1:]
    assert pair.half.rooms[still].state is DecodeState.RECEIVING, "and it gets its pages back afterwards"


def test_a_reservation_with_a_copy_running_or_a_page_just_landed_is_kept() -> None:
    pair = Pair(pages=8, lease_s=3.0)
    busy, computed = Room("busy", 0), Room("computed", 0)
    busy_work, work = job([6] * 9), job([7, *PROMPT[1:]])
    pair.open(busy, busy_work)
    pair.open(computed, work)
    first_offer = next(message for message in pair.compute(busy, busy_work) if isinstance(message, Offer))
    pair.hear([first_offer, *pair.compute(computed, work)])
    pair.decode.wait(10.0)
    assert pair.half.rooms[busy].state is DecodeState.RECEIVING
    pair.decode.copy_all()
    pair.decode.wait(2.9)
    assert pair.half.counters.revocations == 0
    assert pair.half.next_deadline() is not None
    pair.decode.wait(0.2)
    assert pair.half.counters.revocations == 1
    assert pair.half.rooms[computed].state is DecodeState.RECEIVING


def test_a_revoked_room_says_anew_what_it_holds_and_takes_everything_else_again() -> None:
    pair = Pair(pages=8, lease_s=3.0)
    still, computed = Room("still", 0), Room("computed", 0)
    long_work, work = job([6] * 9), job([7, *PROMPT[1:]])
    pair.open(still, long_work)
    messages = pair.compute(still, long_work)
    pair.hear([message for message in messages if isinstance(message, Offer)][:1])
    pair.decode.copy_all()
    pair.open(computed, work)
    pair.decode.now += 3.0
    pair.hear(pair.compute(computed, work))
    assert pair.half.counters.revocations == 1
    pair.decode.copy_all()
    pair.decode.run()
    assert pair.half.rooms[still].state is DecodeState.RECEIVING
    pair.hear(messages)
    pair.decode.copy_all()
    pair.decode.run()
    assert pair.tokens()[-3:] == toy_generate(long_work.prompt, 4)[1:]
    pair.assert_clean()


# ---- copies that fail -----------------------------------------------------------------------------------------------


def test_wrong_bytes_fail_the_room_and_their_pages_stay_away_until_all_copies_ended() -> None:
    pair = Pair()
    pair.open()
    pair.hear(pair.compute())
    pair.decode.take()
    pair.decode.copy((ROOM, 0), corrupt=True)
    (_, failed), abort = pair.decode.take()
    assert isinstance(failed, RoomFailed)
    assert failed.code is FailureCode.TRANSFER_FAILED
    assert "checksum" in failed.detail
    assert abort == (LINK, Abort(ROOM, AbortReason.TRANSFER_FAILED))
    assert pair.half.rooms[ROOM].state is DecodeState.DRAINING
    assert pair.decode.engine.audit().quarantined == 4
    assert pair.decode.copies.running[ROOM, 1].cancelled
    pair.half.handle("router", Abort(ROOM, AbortReason.TRANSFER_FAILED))
    assert pair.decode.take() == [], "acknowledged when nothing is held any more"
    pair.half.fetched(pair.decode.copies.finish((ROOM, 1)))
    assert pair.decode.take() == [("router", Closed(ROOM))]
    pair.assert_clean()
    assert pair.half.counters.fetch_failures == 1, "the cancelled one is no failure"
    assert pair.decode.engine.num_prefix_tokens(PROMPT) == 0, "unverified KV is in no cache"


def test_the_next_epoch_opens_while_the_last_one_is_draining() -> None:
    pair = Pair()
    pair.open()
    pair.hear(pair.compute())
    pair.decode.copy((ROOM, 0), corrupt=True)
    pair.half.handle("router", open_generate(Room("a", 1), job(PROMPT)))
    pair.decode.run()
    assert pair.tokens() == ANSWER
    assert pair.half.rooms[ROOM].state is DecodeState.DRAINING
    assert pair.decode.engine.audit().quarantined == 4
    pair.decode.copy((ROOM, 1))
    pair.assert_clean()


@pytest.mark.parametrize(
    "message",
    [
        Offer(ROOM, 3, [1, 2], [1, 2]),
        Offer(ROOM, -1, [1], [1]),
        Offer(ROOM, 0, [1, 2], [1]),
        Handoff(ROOM, 5, 0, 3),
        Handoff(ROOM, 5, 1, 4),
    ],
)
@pytest.mark.parametrize("granted", [False, True])
def test_what_does_not_fit_the_room_fails_it_in_words(message: Offer | Handoff, granted: bool) -> None:
    pair = Pair()
    pair.half.handle("router", open_decode(ROOM, job(PROMPT)))
    if granted:
        pair.half.tick()
    pair.decode.take()
    pair.half.handle(LINK, message)
    (_, failed), abort = pair.decode.take()
    assert isinstance(failed, RoomFailed)
    assert failed.code is FailureCode.TRANSFER_FAILED
    assert "offer" in failed.detail or "handoff" in failed.detail
    assert abort == (LINK, Abort(ROOM, AbortReason.TRANSFER_FAILED))
    pair.assert_clean()


def test_a_token_that_ends_the_sequence_is_no_handoff() -> None:
    pair = Pair()
    pair.open(work=job(PROMPT, stop_token_ids=(ANSWER[0],)))
    pair.hear(pair.compute())
    pair.decode.copy_all()
    failed = [message for _, message in pair.decode.take() if isinstance(message, RoomFailed)]
    assert [message.code for message in failed] == [FailureCode.INTERNAL]
    pair.assert_clean()


# ---- ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["QUEUED", "RECEIVING", "COPYING", "RUNNING"])
@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("router aborts", [("router", "Closed"), (LINK, "client_gone")]),
        ("prefill aborts", [(LINK, "Closed")]),
        ("prefill never heard of it", [(LINK, "Closed"), ("router", "peer_lost")]),
        ("prefill lost", [("router", "peer_lost")]),
        ("router lost", [(LINK, "client_gone")]),
        ("deadline", [("router", "deadline"), (LINK, "deadline")]),
        ("engine broken", [("router", "internal"), (LINK, "peer_failed")]),
    ],
)
def test_every_end_gives_the_pages_back_and_tells_who_must_know(
    state: str, end: str, told: list[tuple[str, str]]
) -> None:
    pair = Pair()
    pair.half.handle("router", open_decode(ROOM, job(PROMPT, max_tokens=8)))
    if state != "QUEUED":
        pair.half.tick()
    if state in ("COPYING", "RUNNING"):
        pair.hear(pair.compute(work=job(PROMPT, max_tokens=8)))
    if state == "RUNNING":
        pair.decode.copy_all()
        pair.decode.run_pass()
    pair.decode.take()
    match end:
        case "router aborts":
            pair.half.handle("router", Abort(ROOM, AbortReason.CLIENT_GONE))
        case "prefill aborts":
            pair.half.handle(LINK, Abort(ROOM, AbortReason.PEER_FAILED))
        case "prefill never heard of it":
            pair.half.handle(LINK, Abort(ROOM, AbortReason.NEVER_OPENED))
        case "prefill lost":
            pair.half.link_lost(LINK)
        case "router lost":
            pair.half.link_lost("router")
        case "deadline":
            pair.decode.wait(60.0)
        case "engine broken":
            pair.decode.break_engine("out of memory")
    if state == "RUNNING" and end.startswith("prefill"):
        assert pair.decode.take() == [], "prefill's part is over"
        pair.decode.run()
        assert pair.tokens() == toy_generate(PROMPT, 8)[1:]
        return
    if state == "RUNNING":
        told = [(link, what) for link, what in told if link == "router"]
    if state == "COPYING":
        assert pair.decode.engine.audit().quarantined == 4
        for key in list(pair.decode.copies.running):
            pair.half.fetched(pair.decode.copies.finish(key))
    heard = []
    for link, message in pair.decode.take():
        match message:
            case Closed():
                heard.append((link, "Closed"))
            case Abort(_, reason):
                heard.append((link, reason.value))
            case RoomFailed(_, code, detail):
                heard.append((link, code.value))
                assert detail
    assert sorted(heard) == sorted(told)
    pair.assert_clean()
    tokens = len(pair.decode.tokens)
    pair.decode.run_pass()
    assert len(pair.decode.tokens) == tokens
    pair.half.handle("router", Abort(ROOM, AbortReason.CLIENT_GONE))
    assert pair.decode.take() == [("router", Closed(ROOM))]
    pair.half.handle("router", open_decode(ROOM, job(PROMPT)))
    assert pair.half.idle, "a repeated open finds the tombstone"


def test_prefill_ended_the_sequence_with_its_first_token() -> None:
    pair = Pair()
    pair.open()
    pair.decode.take()
    pair.half.handle(LINK, Abort(ROOM, AbortReason.FINISHED_EARLY))
    assert pair.decode.take() == [(LINK, Closed(ROOM))], "the router has heard it from prefill"
    assert pair.half.counters.aborts[AbortReason.FINISHED_EARLY] == 1
    pair.assert_clean()


def test_an_abort_before_the_open_refuses_it() -> None:
    pair = Pair()
    pair.half.handle("router", Abort(ROOM, AbortReason.CLIENT_GONE))
    pair.open()
    closed, (link, failed) = pair.decode.take()
    assert closed == ("router", Closed(ROOM))
    assert link == "router"
    assert isinstance(failed, RoomFailed)
    assert failed.code is FailureCode.REFUSED
    assert pair.decode.connects == []


def test_a_newer_epoch_closes_the_older_and_makes_its_messages_stale() -> None:
    pair = Pair()
    pair.open()
    messages = pair.compute()
    pair.decode.take()
    pair.open(Room("a", 1))
    assert pair.decode.take()[0] == (LINK, Abort(ROOM, AbortReason.SUPERSEDED))
    pair.hear(messages)
    pair.half.handle("router", open_decode(ROOM, job(PROMPT)))
    assert pair.half.counters.messages.stale_messages == 4
    assert list(pair.half.rooms) == [Room("a", 1)]
    assert not pair.decode.copies.running


def test_a_failing_step_reaches_the_router() -> None:
    pair = Pair()
    pair.half.handle("router", open_generate(ROOM, job(PROMPT)))
    pair.decode.model.fail_at.add(1)
    pair.decode.run_pass()
    ((_, failed),) = pair.decode.take()
    assert isinstance(failed, RoomFailed)
    assert failed.code is FailureCode.INTERNAL
    pair.assert_clean()


@pytest.mark.parametrize("receives", [True, False])
def test_a_prompt_that_can_never_fit_is_said_to_be_too_long(receives: bool) -> None:
    pair = Pair(engine={"limits": ToyLimits(max_position_embeddings=8)})
    opening = open_decode if receives else open_generate
    pair.half.handle("router", opening(ROOM, job([1] * 9)))
    pair.half.tick()
    failed = [message for _, message in pair.decode.take() if isinstance(message, RoomFailed)]
    assert [message.code for message in failed] == [FailureCode.TOO_LONG]
    assert "9 tokens" in failed[0].detail
    pair.assert_clean()


@pytest.mark.parametrize("receives", [True, False])
def test_empty_prompts_and_new_rooms_while_draining_are_refused_in_words(receives: bool) -> None:
    opening = open_decode if receives else open_generate
    pair = Pair()
    pair.half.handle("router", open_generate(Room("old", 0), job(PROMPT)))
    pair.half.handle("router", opening(ROOM, job([])))
    pair.half.drain()
    pair.half.handle("router", opening(Room("b", 0), job(PROMPT)))
    failed = [message for _, message in pair.decode.take() if isinstance(message, RoomFailed)]
    assert [message.code for message in failed] == [FailureCode.INTERNAL, FailureCode.DRAINING]
    assert "empty" in failed[0].detail
    assert "draining" in failed[1].detail
    pair.decode.run()
    assert pair.tokens() == ANSWER
    pair.assert_clean()


def test_a_room_that_prefill_finishes_while_it_waits_for_pages_lets_others_go_on() -> None:
    pair = Pair(pages=5)
    pair.open(Room("first", 0))
    pair.open(Room("second", 0), job([9, *PROMPT[1:]]))
    assert pair.half.rooms[Room("second", 0)].state is DecodeState.QUEUED
    pair.half.handle(LINK, Abort(Room("first", 0), AbortReason.FINISHED_EARLY))
    assert pair.half.next_deadline() is not None
    pair.half.tick()
    assert pair.half.rooms[Room("second", 0)].state is DecodeState.RECEIVING


# ---- offers in the middle of a step -------------------------------------------------------------------------------


def test_offers_in_the_middle_of_a_step_begin_their_copies() -> None:
    pair = Pair()
    pair.open()
    for message in pair.compute():
        if isinstance(message, Offer):
            running = len(pair.decode.copies.running)
            assert pair.half.hasten(LINK, message)
            assert len(pair.decode.copies.running) == running + 1
        else:
            pair.hear([message])
    assert pair.half.rooms[ROOM].handoff is not None
    assert pair.half.rooms[ROOM].state is DecodeState.RECEIVING
    pair.decode.copy_all()
    pair.decode.run()
    assert [event.token for _, event in pair.decode.tokens] == ANSWER[1:]


@pytest.mark.parametrize("first", [-1, 3])
def test_an_offer_waits_that_does_not_fit(first: int) -> None:
    pair = Pair()
    pair.open()
    assert not pair.half.hasten(LINK, Offer(ROOM, first, [1, 2], [1, 2]))
    assert pair.half.rooms[ROOM].state is DecodeState.RECEIVING


def test_an_offer_waits_whose_room_has_no_pages_or_is_not_known() -> None:
    pair = Pair()
    pair.half.handle("router", open_decode(ROOM, job(PROMPT)))
    assert pair.half.rooms[ROOM].state is DecodeState.QUEUED
    for room in (ROOM, Room("stranger", 0)):
        assert not pair.half.hasten(LINK, Offer(room, 0, [1], [1]))
    assert not pair.decode.copies.running
