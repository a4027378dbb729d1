"""Clients that leave, do not read or ask for too much: both halves hear, nobody else notices, the books balance."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from router_harness import TEXT, TEXT_IDS, RouterHarness, running_router, until

from protocol.membership import ReplicaRole
from protocol.rooms import AbortReason, OpenDecode, OpenGenerate, OpenPrefill
from protocol.sampling import FinishReason


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterHarness]:
    async with running_router(tmp_path) as harness:
        yield harness


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
async def test_both_halves_hear_that_the_client_left(router: RouterHarness, stream: bool, begun: bool) -> None:
    prefill, decode = await router.pair()
    call = router.complete(stream=stream)
    room = (await prefill.opened(OpenPrefill)).room
    if begun:
        prefill.send(room, 0, TEXT_IDS[0])
        await until(lambda: router.metrics.output_tokens.total == 1)
    call.leave()
    assert (await prefill.aborted(room)).reason is AbortReason.CLIENT_GONE
    assert (await decode.aborted(room)).reason is AbortReason.CLIENT_GONE
    await call.done()
    await router.idle()
    assert router.metrics.sequences["aborted"] == 1
    await until(lambda: router.metrics.closed_rooms.total == 2)


async def test_every_choice_hears_that_the_client_left(router: RouterHarness) -> None:
    replica = await router.add("both", ReplicaRole.AGGREGATED)
    call = router.complete(n=3)
    rooms = [(await replica.opened(OpenGenerate)).room for _ in range(3)]
    call.leave()
    for room in rooms:
        await replica.aborted(room)
    await call.done()
    await router.idle()


async def test_only_decode_hears_when_prefill_is_done(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.complete()
    room = (await prefill.opened(OpenPrefill)).room
    prefill.send(room, 0, TEXT_IDS[0])
    decode.send(room, 1, TEXT_IDS[1])
    await until(lambda: router.metrics.output_tokens.total == 2)
    call.leave()
    await decode.aborted(room)
    await call.done()
    assert prefill.aborts == []


async def test_a_client_that_never_reads_is_dropped_and_slows_nobody(tmp_path: Path) -> None:
    async with running_router(tmp_path, max_buffered_tokens=16) as router:
        replica = await router.add("both", ReplicaRole.AGGREGATED)
        stuck = router.post("/v1/completions", {"prompt": "a", "max_tokens": 200, "stream": True}, reading=False)
        room = (await replica.opened(OpenGenerate)).room
        replica.send(room, 0, TEXT_IDS[0])
        await until(lambda: router.metrics.output_tokens.total == 1)
        for position in range(1, 20):
            replica.send(room, position, TEXT_IDS[position % len(TEXT_IDS)])
        assert (await replica.aborted(room)).reason is AbortReason.CLIENT_GONE
        await stuck.done()
        assert router.metrics.overflows.total == 1
        replica.automatic = True
        assert (await router.complete(max_tokens=100, stream=False).done()).json["choices"][0]["text"] == TEXT
        await router.idle()


async def test_one_write_takes_bounded_time(tmp_path: Path) -> None:
    async with running_router(tmp_path, send_timeout_s=0.05) as router:
        replica = await router.add("both", ReplicaRole.AGGREGATED)
        stuck = router.post("/v1/completions", {"prompt": "a", "stream": True}, reading=False)
        room = (await replica.opened(OpenGenerate)).room
        replica.send(room, 0, TEXT_IDS[0])
        await replica.aborted(room)
        await stuck.done()
        await router.idle()


async def test_deadline_before_the_first_token_is_a_408(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.post("/v1/completions", {"prompt": "a"}, headers={"X-Request-Timeout": "0.05"})
    opened = await prefill.opened(OpenPrefill)
    assert opened.ttl_ms <= 50
    assert (await prefill.aborted(opened.room)).reason is AbortReason.DEADLINE
    assert (await decode.aborted(opened.room)).reason is AbortReason.DEADLINE
    await call.done()
    assert call.status == 408
    assert call.json["error"]["code"] == "deadline_exceeded"
    await router.idle()


async def test_deadline_mid_stream_is_the_last_event(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    body = {"prompt": "a", "stream": True}
    call = router.post("/v1/completions", body, headers={"X-Request-Timeout": "0.2"})
    room = (await prefill.opened(OpenPrefill)).room
    prefill.send(room, 0, TEXT_IDS[0])
    await call.shows("the")
    await decode.aborted(room)
    await call.done()
    assert call.events[-1]["error"]["code"] == "deadline_exceeded"
    await router.idle()


async def test_deadline_ends_a_blocked_write(router: RouterHarness) -> None:
    replica = await router.add("both", ReplicaRole.AGGREGATED)
    headers = {"X-Request-Timeout": "0.1"}
    stuck = router.post("/v1/completions", {"prompt": "a", "stream": True}, headers=headers, reading=False)
    room = (await replica.opened(OpenGenerate)).room
    replica.send(room, 0, TEXT_IDS[0])
    assert (await replica.aborted(room)).reason is AbortReason.DEADLINE
    await stuck.done()
    await router.idle()


async def test_too_many_sequences_are_refused_at_once(tmp_path: Path) -> None:
    async with running_router(tmp_path, max_concurrent_sequences=2) as router:
        replica = await router.add("both", ReplicaRole.AGGREGATED)
        call = router.complete(n=2)
        rooms = [(await replica.opened(OpenGenerate)).room for _ in range(2)]
        refused = await router.complete().done()
        assert refused.status == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json["error"]["type"] == "rate_limit_error"
        for room in rooms:
            replica.send(room, 0, TEXT_IDS[0], finish=FinishReason.LENGTH)
        await call.done()
        replica.automatic = True
        assert (await router.complete().done()).status == 200


async def test_too_many_waiting_tokens_are_refused_at_once(tmp_path: Path) -> None:
    async with running_router(tmp_path, max_queued_tokens=8) as router:
        replica = await router.add("both", ReplicaRole.AGGREGATED)
        ids = list(range(5, 15))
        call = router.complete(prompt=ids)  # longer than the limit, but nothing else waits
        room = (await replica.opened(OpenGenerate)).room
        assert (await router.complete(prompt="a").done()).status == 429
        replica.send(room, 0, TEXT_IDS[0])
        await call.shows("the")
        admitted = router.complete(prompt="a")  # what has its first token waits no more
        await replica.opened(OpenGenerate)
        for each in (call, admitted):
            each.leave()
            await each.done()
        await router.idle()


async def test_no_replica_is_a_503_after_a_wait(tmp_path: Path) -> None:
    async with running_router(tmp_path, failover_wait_s=0.02) as router:
        call = await router.complete().done()
        assert call.status == 503
        assert call.headers["retry-after"] == "1"
        assert call.json["error"]["code"] == "no_replica"
        assert "none came up within 0.02 s" in call.json["error"]["message"]
        health = await router.get("/health").done()
        assert health.status == 503
        assert (await router.get("/health_generate").done()).status == 503
        await router.idle()


async def test_a_request_waits_for_the_first_replica_to_come_up(router: RouterHarness) -> None:
    call = router.complete(n=2, max_tokens=3)
    await until(lambda: len(router.dispatcher.generations) == 2)
    await router.add("both", ReplicaRole.AGGREGATED, automatic=True)
    await call.done()
    assert call.status == 200
    await router.idle()


async def test_waiting_for_the_first_replica_ends_with_the_deadline_or_the_client(router: RouterHarness) -> None:
    body = {"prompt": "a fox"}
    late = await router.post("/v1/completions", body, headers={"X-Request-Timeout": "0.02"}).done()
    assert late.status == 408
    call = router.complete()
    await until(lambda: bool(router.dispatcher.generations))
    call.leave()
    await call.done()
    await router.idle()


async def test_health_follows_the_pools(router: RouterHarness) -> None:
    prefill, decode = await router.pair(automatic=True)
    assert (await router.get("/health").done()).json["status"] == "ok"
    assert (await router.get("/health_generate").done()).json["status"] == "ok"
    assert isinstance(prefill.opens[0], OpenPrefill)
    assert isinstance(decode.opens[0], OpenDecode)
    decode.die()
    await until(lambda: not router.view(decode).is_up)
    health = await router.get("/health").done()
    assert (health.status, health.json["status"]) == (200, "degraded")
    await router.idle()


async def test_health_generate_fails_when_nothing_is_generated(router: RouterHarness) -> None:
    prefill, _ = await router.pair()
    call = router.get("/health_generate", headers={"X-Request-Timeout": "0.05"})
    opened = await prefill.opened(OpenPrefill)
    await prefill.aborted(opened.room)
    await call.done()
    assert call.status == 503
    assert "0 of 2 tokens" in call.json["error"]["message"]


async def test_state_shows_members_and_open_rooms(router: RouterHarness) -> None:
    prefill, _ = await router.pair()
    call = router.complete()
    room = (await prefill.opened(OpenPrefill)).room
    state = (await router.get("/internal/state").done()).json
    assert {member["replica_id"]: member["open_rooms"] for member in state["members"]} == {
        "prefill-0": 1,
        "decode-0": 1,
    }
    (shown,) = state["rooms"]
    assert (shown["request_id"], shown["epoch"], shown["state"]) == (room.request_id, 0, "open")
    assert state["admission"]["sequences"] == 1
    call.leave()
    await call.done()
    state = (await router.get("/internal/state").done()).json
    assert state["rooms"] == []
    assert state["admission"] == {"sequences": 0, "queued_tokens": 0}
    assert state["metrics"]["router_aborts"] == {"client_gone": 2}


async def test_shutdown_aborts_what_is_open(tmp_path: Path) -> None:
    async with running_router(tmp_path) as router:
        replica = await router.add("both", ReplicaRole.AGGREGATED)
        call = router.complete()
        room = (await replica.opened(OpenGenerate)).room
        await router.dispatcher.close()
        await replica.aborted(room)
        await call.done()
        assert call.status == 503


async def test_a_burst_of_clients_half_of_which_leave(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    calls = [router.complete(max_tokens=3) for _ in range(40)]
    rooms = [(await prefill.opened(OpenPrefill)).room for _ in calls]
    for room in rooms:
        prefill.send(room, 0, TEXT_IDS[0])
    for call in calls[::2]:
        call.leave()
    for room in rooms:
        decode.send(room, 1, *TEXT_IDS[1:3], finish=FinishReason.LENGTH)
    await asyncio.gather(*(call.done() for call in calls))
    assert all(call.events[-1] == "[DONE]" for call in calls[1::2])
    await router.idle()


async def test_all_who_ask_for_a_probe_meanwhile_share_one(router: RouterHarness) -> None:
    both = await router.add("both", ReplicaRole.AGGREGATED)
    calls = [router.get("/health_generate") for _ in range(4)]
    opened = await both.opened(OpenGenerate)
    late = router.get("/health_generate", headers={"X-Request-Timeout": "0.02"})
    assert (await late.done()).status == 503
    calls[0].leave()
    await calls[0].done()
    assert not both.aborts
    both.send(opened.room, 0, 5, 6, finish=FinishReason.LENGTH)
    answers = [(await call.done()).json for call in calls[1:]]
    assert len({answer["seconds"] for answer in answers}) == 1
    assert len(both.opens) == 1
    await router.idle()
    both.automatic = True
    assert (await router.get("/health_generate").done()).status == 200
    assert len(both.opens) == 2


async def test_a_probe_ends_with_the_last_who_asked(router: RouterHarness) -> None:
    both = await router.add("both", ReplicaRole.AGGREGATED)
    calls = [router.get("/health_generate") for _ in range(2)]
    opened = await both.opened(OpenGenerate)
    for call in calls:
        call.leave()
        await call.done()
    await both.aborted(opened.room)
    await router.idle()
