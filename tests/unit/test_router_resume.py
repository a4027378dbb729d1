"""Streams that a client comes back to: nothing twice, nothing missing, on the same router or another one."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_harness import END_ID, SECRET, TEXT, TEXT_IDS, TOKENIZER, Call, FakeReplica, RouterHarness, until
from stream_harness import AGAIN, ALICE, BOB, KEYS, came_back, meet, serving, two, until_shown

from protocol.codec import decode_body, encode_frame
from protocol.endpoints import Identity, connect
from protocol.handshake import LinkRole
from protocol.membership import ReplicaRole
from protocol.rooms import AbortReason, Job, OpenGenerate, Room, TokenEvent, TopLogprob
from protocol.sampling import FinishReason, SamplingParams
from router.errors import ApiError
from router.metrics import RouterMetrics
from router.stamp import Stamp, new_router_key, token_of
from router.streams.event_id import Place, checksum, parse_event_id
from router.streams.event_log import EventLog
from router.streams.record import StreamRecord
from router.streams.session import StreamSession
from router.streams.shelf import Gone, Shelf, StreamBusyError


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(KEYS))
    return path


def numbers(call: Call) -> list[int]:
    """Of the events, as their ids have it."""
    return [parse_event_id(each).number for each in call.ids]


def joined(*calls: Call) -> list[Any]:
    return [event for call in calls for event in call.events]


BODY: dict[str, Any] = {"prompt": "a fox", "max_tokens": 100, "stream": True}


@pytest.mark.parametrize("again", ["post", "get"])
@pytest.mark.parametrize("seen", [1, 2, 3])
async def test_a_client_that_was_cut_off_gets_the_rest(tmp_path: Path, again: str, seen: int) -> None:
    async with serving(tmp_path) as (router, replica):
        first = router.post("/v1/completions", BODY)
        room = (await replica.opened(OpenGenerate)).room
        for position in range(3):
            replica.send(room, position, TEXT_IDS[position])
            await until_shown(first, position + 1)
        first.leave()
        assert (await replica.aborted(room)).reason is AbortReason.CLIENT_GONE
        await first.task

        last = {"Last-Event-ID": first.ids[seen - 1]}
        if again == "post":
            second = router.post("/v1/completions", dict(reversed(BODY.items())), headers=last)
        else:
            second = came_back(router, first, seen=seen)
        opened = await replica.opened(OpenGenerate)
        assert opened.room == Room(room.request_id, room.epoch + 1)
        assert opened.job.logged == TEXT_IDS[:3]
        replica.send(opened.room, 3, *TEXT_IDS[3:], END_ID, finish=FinishReason.STOP_TOKEN)
        await second.done()

        assert numbers(second) == list(range(seen + 1, seen + 1 + len(second.ids)))
        kept = Call.__new__(Call)
        kept.body = b"\n\n".join([*first.body.split(b"\n\n")[:seen], second.body])
        assert kept.streamed_text == TEXT
        assert kept.events[-1] == "[DONE]"
        assert len({event["id"] for event in kept.events[:-1]}) == 1
        await router.idle()
        assert router.metrics.itl_s.sum < 1000


async def test_a_client_that_comes_back_before_its_end_was_noticed_takes_the_stream_over(tmp_path: Path) -> None:
    async with serving(tmp_path) as (router, replica):
        first = router.post("/v1/completions", BODY)
        room = (await replica.opened(OpenGenerate)).room
        replica.send(room, 0, TEXT_IDS[0])
        await until_shown(first, 1)
        second = came_back(router, first, seen=1)
        assert (await replica.aborted(room)).reason is AbortReason.CLIENT_GONE
        opened = await replica.opened(OpenGenerate)
        await first.task
        replica.send(opened.room, 1, *TEXT_IDS[1:], END_ID, finish=FinishReason.STOP_TOKEN)
        await second.done()
        assert first.streamed_text + second.streamed_text == TEXT


async def test_a_finished_stream_is_told_again_without_any_replica(tmp_path: Path) -> None:
    async with serving(tmp_path) as (router, replica):
        replica.automatic = True
        body = BODY | {"n": 3, "stream_options": {"include_usage": True}, "logprobs": 2}
        whole = await router.post("/v1/completions", body).done()
        replica.die()
        for seen in range(len(whole.ids) + 1):
            rest = await came_back(router, whole, seen=seen).done()
            assert (rest.status, rest.ids, rest.events) == (200, whole.ids[seen:], whole.events[seen:])
        assert len(replica.opens) == 3


async def test_sequences_that_have_finished_are_not_begun_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as (router, replica):
        first = router.post("/v1/completions", BODY | {"n": 2})
        rooms = [(await replica.opened(OpenGenerate)).room for _ in range(2)]
        replica.send(rooms[0], 0, TEXT_IDS[0])
        replica.send(rooms[1], 0, TEXT_IDS[0], TEXT_IDS[1], END_ID, finish=FinishReason.STOP_TOKEN, choice=1)
        await until_shown(first, 2)
        first.leave()
        await first.task
        second = came_back(router, first, seen=1)
        opened = await replica.opened(OpenGenerate)
        assert (opened.room, opened.job.logged) == (Room(rooms[0].request_id, 1), TEXT_IDS[:1])
        replica.send(opened.room, 1, END_ID, finish=FinishReason.STOP_TOKEN)
        await second.done()
        choices = [each["choices"][0] for each in [*first.events[:1], *second.events[:-1]]]
        texts = ["".join(each["text"] for each in choices if each["index"] == index) for index in range(2)]
        assert texts == [TOKENIZER.decode(TEXT_IDS[:1]), TOKENIZER.decode(TEXT_IDS[:2])]
        assert len(replica.opens) == 3


async def test_an_error_has_no_id_so_the_stream_goes_on_before_it(tmp_path: Path) -> None:
    async with serving(tmp_path, failover_wait_s=0.05) as (router, replica):
        first = router.post("/v1/completions", BODY)
        room = (await replica.opened(OpenGenerate)).room
        replica.send(room, 0, TEXT_IDS[0])
        await until_shown(first, 1)
        router.remove(replica)
        replica.die()
        await first.done()
        assert (first.ids[-1], first.events[-1]["error"]["code"]) == ("", "no_replica")
        other = await router.add("other", ReplicaRole.AGGREGATED)
        second = came_back(router, first, seen=1)
        opened = await other.opened(OpenGenerate)
        assert (opened.room.epoch, opened.job.logged) == (1, TEXT_IDS[:1])
        other.send(opened.room, 1, END_ID, finish=FinishReason.STOP_TOKEN)
        await second.done()
        assert second.events[-1] == "[DONE]"


async def test_a_stream_is_its_tenants_alone_and_its_requests(tmp_path: Path, keys: Path) -> None:
    async with serving(tmp_path, api_keys_file=keys) as (router, replica):
        replica.automatic = True
        first = await router.post("/v1/completions", BODY, headers=ALICE).done()
        last = {"Last-Event-ID": first.ids[0]}
        response_id, _, _ = first.ids[0].partition(":")
        name = f"/v1/streams/{response_id}"
        cases = [
            (router.get(name, headers=BOB | last), 404, "stream_not_found"),
            (router.post("/v1/completions", BODY, headers=BOB | last), 404, "stream_not_found"),
            (router.get(f"/v1/streams/{response_id[:-1]}0x", headers=ALICE), 404, "stream_not_found"),
            (router.get("/v1/streams/anything", headers=ALICE), 404, "stream_not_found"),
            (router.get(name, headers=ALICE | {"Last-Event-ID": f"{response_id}:999999999"}), 200, None),
            (router.get(name, headers=ALICE | {"Last-Event-ID": "nonsense"}), 400, "invalid_value"),
            (router.get(name, headers=ALICE | {"Last-Event-ID": f"cmpl-{'0' * 32}:1"}), 400, "stream_mismatch"),
            (router.post("/v1/completions", BODY | {"seed": 1}, headers=ALICE | last), 400, "stream_mismatch"),
            (router.post("/generate", {"text": "a"}, headers=ALICE | last), 400, "stream_mismatch"),
            (router.get(name), 401, "missing_api_key"),
        ]
        for call, status, code in cases:
            await call.done()
            assert call.status == status
            assert status == 200 or call.json["error"]["code"] == code
        rest = await router.get(name, headers=AGAIN | last).done()
        assert first.events[:1] + rest.events == first.events


async def test_an_event_that_has_not_been_is_refused_and_the_stream_stays(tmp_path: Path) -> None:
    async with serving(tmp_path) as (router, replica):
        first = router.post("/v1/completions", BODY)
        room = (await replica.opened(OpenGenerate)).room
        replica.send(room, 0, TEXT_IDS[0])
        await until_shown(first, 1)
        first.leave()
        await first.task
        response_id = first.ids[0].partition(":")[0]
        early = await router.get(f"/v1/streams/{response_id}", headers={"Last-Event-ID": f"{response_id}:2"}).done()
        assert (early.status, early.json["error"]["param"]) == (400, "Last-Event-ID")
        second = came_back(router, first, seen=1)
        opened = await replica.opened(OpenGenerate)
        replica.send(opened.room, 1, END_ID, finish=FinishReason.STOP_TOKEN)
        assert (await second.done()).events[-1] == "[DONE]"


async def test_where_it_is_switched_off_events_have_no_ids(tmp_path: Path) -> None:
    async with serving(tmp_path, resume_window_s=0) as (router, replica):
        replica.automatic = True
        call = await router.post("/v1/completions", BODY).done()
        assert set(call.ids) == {""}
        gone = await router.get(f"/v1/streams/{call.events[0]['id']}").done()
        assert (gone.status, gone.json["error"]["code"]) == (410, "stream_not_kept")
        assert "resume_window_s is 0" in gone.json["error"]["message"]


async def test_timelines_are_not_kept_and_who_comes_back_is_told_so(tmp_path: Path, keys: Path) -> None:
    async with two(tmp_path, keys) as ((one, replica), (other, _)):
        call = one.post("/v1/completions", BODY | {"return_timeline": True}, headers=ALICE)
        room = (await replica.opened(OpenGenerate)).room
        replica.send(room, 0, TEXT_IDS[0])
        await until_shown(call, 1)
        path = f"/v1/streams/{call.events[0]['id']}"

        async def told(router: RouterHarness) -> str:
            gone = await router.get(path, headers=ALICE).done()
            assert (gone.status, gone.json["error"]["code"]) == (410, "stream_not_kept")
            return str(gone.json["error"]["message"])

        assert "return_timeline" in await told(one)
        assert (await one.get(path, headers=BOB).done()).status == 404
        replica.send(room, 1, END_ID, finish=FinishReason.STOP_TOKEN)
        await call.done()
        assert set(call.ids) == {""}
        assert await told(one) == await told(other)


# ---- between routers --------------------------------------------------------------------------------------------


async def test_a_stream_moves_to_the_router_its_client_comes_back_to(tmp_path: Path, keys: Path) -> None:
    async with two(tmp_path, keys) as ((one, one_replica), (other, other_replica)):
        first = one.post("/v1/completions", BODY | {"logprobs": 1}, headers=ALICE)
        room = (await one_replica.opened(OpenGenerate)).room
        one_replica.send(room, 0, TEXT_IDS[0], logprob=-0.5)
        await until_shown(first, 1)

        assert (await came_back(other, first, seen=1, headers=BOB).done()).status == 404
        second = came_back(other, first, seen=1, headers=ALICE)  # while the first still runs
        assert (await one_replica.aborted(room)).reason is AbortReason.CLIENT_GONE
        opened = await other_replica.opened(OpenGenerate)
        assert (opened.room, opened.job.logged) == (Room(room.request_id, 1), TEXT_IDS[:1])
        other_replica.send(opened.room, 1, TEXT_IDS[1], logprob=-0.25)
        await until_shown(second, 1)
        second.leave()
        await second.task

        # an id of the first router leads to the second, and back
        third = came_back(one, first, seen=1, headers=ALICE)
        opened = await one_replica.opened(OpenGenerate)
        assert (opened.room.epoch, opened.job.logged) == (2, TEXT_IDS[:2])
        one_replica.send(opened.room, 2, END_ID, finish=FinishReason.STOP_TOKEN)
        await third.done()
        assert third.events[0] == second.events[0]
        assert third.ids[0] == second.ids[0]
        assert first.streamed_text + third.streamed_text == TOKENIZER.decode(TEXT_IDS[:2])

        fourth = await came_back(other, first, seen=0, headers=ALICE).done()
        assert joined(fourth) == first.events[:1] + third.events


async def test_a_router_that_is_gone_took_its_logs_along(tmp_path: Path, keys: Path) -> None:
    async with two(tmp_path, keys) as ((one, replica), (other, _)):
        replica.automatic = True
        first = await one.post("/v1/completions", BODY, headers=ALICE).done()
        meet(other)
        call = await came_back(other, first, seen=1, headers=ALICE).done()
        assert (call.status, call.json["error"]["code"]) == (410, "stream_gone")
        meet(one, other)
        await one.app.state.moves.close()
        call = await came_back(other, first, seen=1, headers=ALICE).done()
        assert (call.status, call.json["error"]["code"]) == (503, "stream_busy")
        assert call.headers["retry-after"] == "1"


async def test_routers_only_talk_about_streams_and_only_to_those_with_the_secret(tmp_path: Path) -> None:
    async with serving(tmp_path) as (router, _):
        address = router.app.state.peering.report().address
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        link = await connect(
            address,
            secret=SECRET,
            identity=Identity(role=LinkRole.ROUTER, peer_id="other", boot=1),
            on_message=lambda link, message: None,
            on_lost=lambda link, why: lost.set_result(why),
        )
        link.send(OpenGenerate(Room("r", 0), Job(prompt=[1], sampling=SamplingParams()), 1000))
        assert await asyncio.wait_for(lost, 10)
        with pytest.raises(ConnectionError):
            await connect(
                address,
                secret=b"another secret",
                identity=Identity(role=LinkRole.ROUTER, peer_id="other", boot=1),
                on_message=lambda link, message: None,
                on_lost=lambda link, why: None,
            )


# ---- a router that died -----------------------------------------------------------------------------------------

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "a fox?"}], "stream": True}
ALL = [*TEXT_IDS, END_ID]


def play(replica: FakeReplica, room: Room, sizes: list[int], tokens: list[int]) -> None:
    """Send all tokens, in frames of these sizes and one for the rest."""
    position = 0
    for size in [*sizes, len(tokens)]:
        part = tokens[position : position + size]
        if part:
            last = position + len(part) == len(tokens)
            replica.send(room, position, *part, finish=FinishReason.STOP_TOKEN if last else None)
        position += len(part)


def glued(path: str, events: list[Any]) -> str:
    choices = [event["choices"][0] for event in events if event != "[DONE]"]
    return "".join(each["text"] if path == "/v1/completions" else each["delta"].get("content", "") for each in choices)


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)])
async def test_the_stream_of_a_dead_router_is_made_again(
    tmp_path: Path, keys: Path, path: str, body: dict[str, Any]
) -> None:
    """From every event on, though the tokens come in other frames the second time."""
    async with two(tmp_path, keys) as ((one, one_replica), (other, other_replica)):
        first = one.post(path, body, headers=ALICE)
        room = (await one_replica.opened(OpenGenerate)).room
        sent = 0
        while sent < len(TEXT_IDS):  # batches of two that are written before the next one comes
            part = TEXT_IDS[sent : sent + 2]
            one_replica.send(room, sent, *part)
            sent += len(part)
            await until(lambda count=sent: output_tokens(one) == count and not waiting(one))  # type: ignore[misc]
        one_replica.send(room, sent, END_ID, finish=FinishReason.STOP_TOKEN)
        await first.done()
        assert glued(path, first.events) == TEXT
        meet(other)
        for seen in range(1, len(first.ids) + 1):
            second = other.post(path, body, headers=ALICE | {"Last-Event-ID": first.ids[seen - 1]})
            opened = await other_replica.opened(OpenGenerate)
            assert (opened.job.logged, opened.job.sampling.seed) == ([], one_replica.opens[0].job.sampling.seed)
            assert opened.room.request_id != room.request_id
            play(other_replica, opened.room, [1 + seen % 4] * seen, ALL)
            await second.done()
            assert second.status == 200
            assert numbers(second) == list(range(seen + 1, seen + 1 + len(second.ids)))
            both = first.events[:seen] + second.events
            assert (glued(path, both), both[-1]) == (TEXT, "[DONE]")
            assert {event["id"] for event in both[:-1]} == {first.events[0]["id"]}
            # it is this router's now, and can be come back to like any
            third = await came_back(other, first, seen=seen, headers=ALICE).done()
            assert (third.ids, third.events) == (second.ids, second.events)
            await other.app.state.shelf.take(parse_event_id(first.ids[0]).token, "a")  # for the next turn


def output_tokens(router: RouterHarness) -> int:
    count: int = router.metrics.output_tokens.total
    return count


def waiting(router: RouterHarness) -> bool:
    """Whether tokens have been logged that are not written yet."""
    return any(each._stream._ready for each in router.dispatcher.generations.values())


async def test_a_stream_that_comes_out_differently_is_not_gone_on_with(tmp_path: Path, keys: Path) -> None:
    async with two(tmp_path, keys) as ((one, one_replica), (other, other_replica)):
        first = one.post("/v1/completions", BODY, headers=ALICE)
        one_replica.send((await one_replica.opened(OpenGenerate)).room, 0, *TEXT_IDS[:4])
        await until_shown(first, 1)
        meet(other)
        for tokens in ([*TEXT_IDS[:3], TEXT_IDS[0], END_ID], [*TEXT_IDS[:2], END_ID]):
            second = other.post("/v1/completions", BODY, headers=ALICE | {"Last-Event-ID": first.ids[0]})
            play(other_replica, (await other_replica.opened(OpenGenerate)).room, [], tokens)
            await second.done()
            assert (second.status, second.json["error"]["code"]) == (410, "stream_gone")
            await other.idle()
        many = other.post("/v1/completions", BODY | {"n": 2}, headers=ALICE | {"Last-Event-ID": first.ids[0]})
        assert (await many.done()).status == 410
        first.leave()
        await first.task


async def test_a_stream_that_moved_before_its_first_router_died_is_found(tmp_path: Path, keys: Path) -> None:
    async with (
        two(tmp_path, keys) as ((one, one_replica), (other, other_replica)),
        serving(tmp_path / "three", api_keys_file=keys) as (third, third_replica),
    ):
        one_replica.automatic = True
        first = await one.post("/v1/completions", BODY, headers=ALICE).done()
        moved = await came_back(other, first, seen=1, headers=ALICE).done()
        meet(other, third)
        again = await came_back(third, first, seen=1, headers=ALICE).done()
        assert (again.ids, again.events) == (moved.ids, moved.events)
        assert third_replica.opens == other_replica.opens == []


@pytest.mark.parametrize(
    "tail", ["", ":", ":x", ":1.", ":1.0.1.1", ":1.2.1.1.00000000", ":1.0.1.2.00000000", ":1.0.1.0.00000000"]
)
def test_what_is_no_id_of_an_event_is_refused(tail: str) -> None:
    with pytest.raises(ApiError, match="no id of an event"):
        parse_event_id(f"cmpl-{Stamp.new(new_router_key()).token}{tail}")


def test_ids_of_events_are_read() -> None:
    token = Stamp.new(new_router_key()).token
    assert parse_event_id(f"{token}:3").place is None
    assert parse_event_id(f"cmpl-{token}:3.0.1.2.00c0ffee").place == Place(0, 1, 2, 0xC0FFEE)
    assert checksum([3, 4], checksum([1, 2])) == checksum([1, 2, 3, 4])


# ---- the parts --------------------------------------------------------------------------------------------------


def record(tenant: str = "", *, tokens: int = 1, body: bytes = b"{}") -> StreamRecord:
    made = StreamRecord(stamp=Stamp.new(new_router_key(), tenant=tenant), path="/v1/completions", body=body)
    for position in range(tokens):
        made.log.append([(0, TokenEvent("r", 0, 0, position, 7))])
    return made


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def shelf(clock: Clock, metrics: RouterMetrics | None = None, **limits: int) -> Shelf:
    bounds = {"max_streams": 3, "max_bytes": 1000} | limits
    return Shelf(window_s=60.0, clock=clock, metrics=metrics or RouterMetrics(), **bounds)


def put(on: Shelf, *records: StreamRecord) -> None:
    for each in records:
        on.begin(each)
        on.keep(each)


async def test_the_shelf_keeps_for_a_minute_and_within_its_bounds() -> None:
    clock, metrics = Clock(), RouterMetrics()
    on = shelf(clock, metrics)
    records = [record() for _ in range(5)]
    put(on, *records)
    assert [await on.take(each.stamp.token, "") for each in records[:2]] == [Gone(), Gone()]
    assert await on.take(records[4].stamp.token, "") is records[4]
    clock.now = 59.0
    assert await on.take(records[3].stamp.token, "") is records[3]
    clock.now = 60.0
    assert await on.take(records[2].stamp.token, "") == Gone()
    assert metrics.dropped_streams.values == {"space": 2, "time": 1}

    big, small = record(tokens=50), record()
    put(on, big, small, record(tokens=50))  # 600 bytes each
    assert await on.take(big.stamp.token, "") == Gone()
    assert await on.take(small.stamp.token, "") is small
    too_big, empty = record(tokens=100), record(tokens=0)
    put(on, too_big, empty)
    assert await on.take(too_big.stamp.token, "") == Gone()
    assert await on.take(empty.stamp.token, "") is None
    assert await on.take("nothing", "") is None


async def test_requests_of_streams_being_written_take_of_the_same_space() -> None:
    on = shelf(Clock())
    kept, first, second = record(body=b"x" * 400), *(record(tokens=0, body=b"x" * 600) for _ in range(2))
    put(on, kept)
    for each in (first, second):
        on.begin(each)
    assert on.hold(first)
    assert await on.take(kept.stamp.token, "") == Gone()  # it made room
    assert not on.hold(second)
    again = record(body=b"x" * 600)
    on.begin(again)
    assert on.hold(again)  # it has been written before
    for each in (first, again):
        on.keep(each)
    assert on.hold(second)
    on.keep(second)


@pytest.mark.parametrize("limit", [1000, 100])
async def test_a_stream_whose_request_finds_no_space_has_no_ids(tmp_path: Path, limit: int) -> None:
    async with serving(tmp_path, resume_max_bytes=limit) as (router, replica):
        call = router.complete(prompt="a fox" * 20)
        opened = await replica.opened(OpenGenerate)
        (live,) = router.app.state.shelf._live.values()
        replica.send(opened.room, 0, *TEXT_IDS[:8], finish=FinishReason.LENGTH)
        await call.done()
        assert call.events[-1] == "[DONE]"
        assert [bool(each) for each in call.ids] == [limit == 1000] * len(call.ids)
        assert bool(live.record.body) == (limit == 1000)


@pytest.mark.parametrize("fields", [{"stream": False}, {"return_timeline": True}])
async def test_a_request_that_cannot_be_come_back_to_is_let_go_of_once_read(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    async with serving(tmp_path) as (router, replica):
        call = router.complete(**fields)
        opened = await replica.opened(OpenGenerate)
        (live,) = router.app.state.shelf._live.values()
        assert live.record.body == b""
        replica.send(opened.room, 0, *TEXT_IDS[:8], finish=FinishReason.LENGTH)
        assert (await call.done()).status == 200


async def test_of_two_who_take_a_stream_one_gets_it() -> None:
    on, it = shelf(Clock()), record("a")
    on.begin(it)
    takers = [asyncio.create_task(on.take(it.stamp.token, "a")) for _ in range(2)]
    stranger = asyncio.create_task(on.take(it.stamp.token, "b"))
    await asyncio.sleep(0)
    on.keep(it)
    results = await asyncio.gather(*takers, stranger, return_exceptions=True)
    assert results[0] is it
    assert isinstance(results[1], StreamBusyError)
    assert results[2] is None


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_log_gives_its_batches_back_also_after_a_journey(data: st.DataObject) -> None:
    positions = itertools.count()
    events = st.builds(
        lambda token, logprob, finish, top: (0, TokenEvent("r", 1, 0, next(positions), token, logprob, top, finish)),
        st.integers(0, 2**31 - 1),
        st.none() | st.floats(-10, 0),
        st.none() | st.sampled_from(FinishReason),
        st.none() | st.just([TopLogprob(3, -1.0)]),
    )
    batches = data.draw(st.lists(st.lists(events, min_size=1, max_size=4), max_size=8))
    made = record(tokens=0)
    for batch in batches:
        made.log.append(batch)
    moved = StreamRecord.unpacked(decode_body(encode_frame(made.packed())[4:]))  # type: ignore[arg-type]
    for log in (made.log, moved.log):
        found = [[(index, said(event)) for index, event in batch] for batch in log.batches()]
        assert found == [[(index, said(event)) for index, event in batch] for batch in batches]
    assert moved.stamp == made.stamp
    assert isinstance(moved.log, EventLog)


def said(event: TokenEvent) -> tuple[Any, ...]:
    return event.position, event.token, event.logprob, event.top, event.finish


@given(st.integers(0, 12), st.lists(st.integers(0, 3), max_size=6))
def test_events_are_numbered_however_they_are_grouped(seen: int, groups: list[int]) -> None:
    session = StreamSession(record(tokens=0), response_id="x-1", single=False, seen=seen)
    events = iter(range(1, 100))
    out = b"".join(session.numbered(b"".join(b"data: %d\n\n" % next(events) for _ in range(size))) for size in groups)
    total = sum(groups)
    assert out == b"".join(b"id: x-1:%d\ndata: %d\n\n" % (number, number) for number in range(seen + 1, total + 1))


def test_a_stamp_can_be_made_again_from_its_token() -> None:
    made = Stamp.new("0123abcd", tenant="t")
    again = Stamp(made.token, "t")
    assert (again.owner, again.created, again.seed) == ("0123abcd", made.created, made.seed)
    assert 0 <= made.seed < 2**63
    assert token_of(f"chatcmpl-{made.token}") == token_of(made.token) == made.token
    assert [token_of(text) for text in ("", "cmpl-", "cmpl-xyz", made.token[1:], made.token.upper())] == [None] * 5


def test_namespaces_of_tenants_and_salts_are_apart() -> None:
    stamps = [Stamp("", tenant) for tenant in ("", "a", "b")]
    spaces = [stamp.namespace(salt) for stamp in stamps for salt in (None, "", "a", "b", "/")]
    assert len(set(spaces)) == len(spaces)
