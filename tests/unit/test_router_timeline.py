"""The timeline that a client asks for: what replicas told and the epochs it took, in every API."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from router_harness import TEXT, TEXT_IDS, Call, FakeReplica, RouterHarness, running_router, until

from protocol.phases import Phase
from protocol.rooms import FailureCode, OpenDecode, OpenGenerate, OpenPrefill, Phases, Room
from protocol.sampling import FinishReason


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterHarness]:
    async with running_router(tmp_path) as harness:
        yield harness


def tell(replica: FakeReplica, room: Room, name: str, *, seconds: float, **more: Any) -> None:
    """One phase that ends now."""
    now_us = time.time_ns() // 1000
    replica.link.send(Phases(room, [Phase(name, now_us - round(seconds * 1e6), now_us, **more)]))


async def answered(router: RouterHarness, call: Call) -> None:
    """A pair of replicas serves one request of four tokens, and each tells of one phase."""
    prefill, decode = router.members
    opening = await prefill.opened(OpenPrefill)
    await decode.opened(OpenDecode)
    assert opening.job.timeline
    tell(prefill, opening.room, "compute", seconds=0.5)
    prefill.send(opening.room, 0, TEXT_IDS[0])
    tell(decode, opening.room, "transfer", seconds=0.25, transport="shm", peer="prefill-0", bytes=4096)
    decode.send(opening.room, 1, *TEXT_IDS[1:4], finish=FinishReason.LENGTH)
    await call.done()
    await router.idle()


def check(timeline: dict[str, Any]) -> None:
    """It is the one that `answered` told."""
    assert abs(timeline["received"] - time.time()) < 60
    assert 0 <= timeline["first_token_ms"] <= timeline["total_ms"]
    (epoch,) = timeline["epochs"]
    assert (epoch["prefill"], epoch["decode"], epoch["outcome"]) == ("prefill-0", "decode-0", "finished")
    assert epoch["start_ms"] + epoch["duration_ms"] <= timeline["total_ms"] + 0.002
    compute, route, transfer = sorted(timeline["phases"], key=lambda phase: phase["name"])
    assert (route["name"], route["replica"], route["duration_ms"]) == ("route", "router", epoch["start_ms"])
    assert (compute["replica"], compute["duration_ms"], compute["epoch"]) == ("prefill-0", 500.0, 0)
    assert "transport" not in compute
    assert (transfer["replica"], transfer["duration_ms"]) == ("decode-0", 250.0)
    assert (transfer["transport"], transfer["peer"], transfer["bytes"]) == ("shm", "prefill-0", 4096)


@pytest.mark.parametrize("usage", [False, True])
async def test_a_completion_stream_ends_with_it(router: RouterHarness, usage: bool) -> None:
    await router.pair()
    call = router.complete(max_tokens=4, return_timeline=True, stream_options={"include_usage": usage})
    await answered(router, call)
    *pieces, last, done = call.events
    assert done == "[DONE]"
    assert all("timeline" not in piece for piece in pieces)
    assert last["choices"] == []
    assert ("usage" in last) == usage
    (timeline,) = last["timeline"]
    assert timeline["index"] == 0
    check(timeline)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_completion_has_it_at_its_top(router: RouterHarness, stream: bool) -> None:
    await router.pair()
    messages = [{"role": "user", "content": "a fox"}]
    body = {"messages": messages, "max_tokens": 4, "stream": stream, "return_timeline": True}
    call = router.post("/v1/chat/completions", body)
    await answered(router, call)
    (timeline,) = (call.events[-2] if stream else call.json)["timeline"]
    check(timeline)


@pytest.mark.parametrize("stream", [False, True])
async def test_sglang_generate_has_it_in_meta_info(router: RouterHarness, stream: bool) -> None:
    await router.pair()
    body = {"text": "a fox", "max_new_tokens": 4, "stream": stream, "return_timeline": True}
    call = router.post("/generate", body)
    await answered(router, call)
    outputs = call.events[:-1] if stream else [call.json]
    assert all("timeline" not in output["meta_info"] for output in outputs[:-1])
    check(outputs[-1]["meta_info"]["timeline"])


async def test_each_choice_has_its_own(router: RouterHarness) -> None:
    await router.pair(automatic=True)
    call = router.post("/v1/completions", {"prompt": "a fox", "max_tokens": 2, "n": 3, "return_timeline": True})
    await call.done()
    assert [timeline["index"] for timeline in call.json["timeline"]] == [0, 1, 2]


async def test_a_failover_shows_as_two_epochs_with_the_phases_of_both(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.complete(max_tokens=4, return_timeline=True)
    room = (await prefill.opened(OpenPrefill)).room
    await decode.opened(OpenDecode)
    tell(decode, room, "transfer", seconds=0.25, error="a checksum is wrong")
    decode.fail(room, FailureCode.TRANSFER_FAILED)
    again = await decode.opened(OpenGenerate)
    assert again.job.timeline
    tell(prefill, room, "compute", seconds=0.5)  # crossed with the failure
    prefill.send(room, 0, TEXT_IDS[0])
    await until(lambda: router.metrics.stale_messages.total == 1)
    tell(decode, again.room, "compute", seconds=0.25)
    decode.send(again.room, 0, *TEXT_IDS[:4], finish=FinishReason.LENGTH)
    await call.done()
    (timeline,) = call.events[-2]["timeline"]
    first, second = timeline["epochs"]
    assert (first["outcome"], first["detail"]) == ("transfer_failed", "as scripted")
    assert (second["prefill"], second["decode"], second["outcome"]) == (None, "decode-0", "finished")
    assert first["start_ms"] + first["duration_ms"] <= second["start_ms"]
    phases = {(phase["epoch"], phase["name"]): phase for phase in timeline["phases"]}
    assert set(phases) == {(0, "route"), (0, "transfer"), (0, "compute"), (1, "compute")}
    assert phases[0, "transfer"]["error"] == "a checksum is wrong"
    assert "error" not in phases[1, "compute"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
async def test_nobody_who_does_not_ask_gets_one(router: RouterHarness, path: str) -> None:
    prefill, _ = await router.pair(automatic=True)
    prompts: dict[str, Any] = {
        "/v1/completions": {"prompt": "a fox"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a fox"}]},
        "/generate": {"text": "a fox"},
    }
    call = router.post(path, prompts[path])
    await call.done()
    assert call.status == 200
    assert "timeline" not in call.body.decode()
    assert not (await prefill.opened(OpenPrefill)).job.timeline


async def test_phases_of_requests_that_are_over_or_did_not_ask_are_dropped(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.complete(max_tokens=2)
    room = (await prefill.opened(OpenPrefill)).room
    tell(prefill, room, "compute", seconds=0.5)
    await until(lambda: router.metrics.stale_messages.total == 1)
    prefill.send(room, 0, TEXT_IDS[0])
    decode.send(room, 1, TEXT_IDS[1], finish=FinishReason.LENGTH)
    await call.done()
    assert TEXT.startswith(call.streamed_text)
    tell(decode, room, "decode", seconds=0.5)
    await until(lambda: router.metrics.stale_messages.total == 2)


async def test_a_value_that_is_no_yes_or_no_is_refused(router: RouterHarness) -> None:
    call = router.post("/v1/completions", {"prompt": "a fox", "return_timeline": "yes"})
    await call.done()
    assert call.status == 400
    assert call.json["error"]["param"] == "return_timeline"


async def test_a_request_that_is_aborted_tells_it_too(router: RouterHarness) -> None:
    prefill, _ = await router.pair()
    call = router.post("/generate", {"text": "a fox", "rid": "mine", "max_new_tokens": 50, "return_timeline": True})
    await prefill.opened(OpenPrefill)
    await router.post("/abort_request", {"rid": "mine"}).done()
    meta = (await call.done()).json["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    (epoch,) = meta["timeline"]["epochs"]
    assert epoch["outcome"] == "aborted"
    assert meta["timeline"]["first_token_ms"] is None
    await router.idle()


async def test_a_request_that_is_aborted_before_a_replica_is_up_tells_it_too(router: RouterHarness) -> None:
    body = {"prompt": "a fox", "rid": "mine", "max_tokens": 50, "return_timeline": True}
    call = router.post("/v1/completions", body)
    await until(lambda: bool(router.dispatcher.generations))
    await router.post("/abort_request", {"rid": "mine"}).done()
    (timeline,) = (await call.done()).json["timeline"]
    assert timeline["epochs"] == []
    assert timeline["phases"][0]["duration_ms"] == timeline["total_ms"]
    await router.idle()
