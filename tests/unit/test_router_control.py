"""Ending requests by name, at whichever router they are; flushing caches; and what the router tells of itself."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from router_harness import SECRET, TEXT, TEXT_IDS, RouterHarness, running_router, until

from cluster.engine_events import Event, Received
from cluster.peer_links import PeerLinks
from protocol.endpoints import Identity, LinkServer
from protocol.handshake import LinkRole
from protocol.membership import Member, ReplicaRole
from protocol.rooms import AbortReason, OpenGenerate, OpenPrefill
from router.config import RouterConfig
from router.version import VERSION

LONG = {"max_new_tokens": 50, "temperature": 0}


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterHarness]:
    async with running_router(tmp_path) as harness:
        yield harness


async def test_a_stream_is_ended_by_its_name_and_keeps_what_it_has(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.post("/generate", {"text": "a fox", "rid": "mine", "stream": True, **LONG})
    other = router.post("/generate", {"text": "a dog", "rid": "other", **LONG})
    opened = await prefill.opened(OpenPrefill)
    untouched = await prefill.opened(OpenPrefill)
    prefill.send(opened.room, 0, TEXT_IDS[0])
    await call.shows("the")
    answer = await router.post("/abort_request", {"rid": "mine"}).done()
    assert (answer.status, answer.json["sequences_ended_here"]) == (200, 1)
    *_, last, done = (await call.done()).events
    assert done == "[DONE]"
    assert last["text"] == "the"
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert last["meta_info"]["completion_tokens"] == 1
    assert (await prefill.aborted(opened.room)).reason is AbortReason.CLIENT_GONE
    await decode.aborted(opened.room)
    assert not any(abort.room == untouched.room for abort in prefill.aborts)
    assert (await router.post("/abort_request", {"abort_all": True}).done()).json["sequences_ended_here"] == 1
    assert (await other.done()).json["meta_info"]["finish_reason"]["type"] == "abort"
    assert (await router.post("/abort_request", {"rid": "mine"}).done()).json["sequences_ended_here"] == 0
    await router.idle()


async def test_one_prompt_of_a_batch_is_ended_alone(router: RouterHarness) -> None:
    replica = await router.add("one", ReplicaRole.AGGREGATED)
    body = {"text": ["a fox", "a dog"], "rid": ["fox", "dog"], "sampling_params": {**LONG, "n": 2}}
    call = router.post("/generate", body)
    opens = [await replica.opened(OpenGenerate) for _ in range(4)]
    ended = [(await router.post("/abort_request", {"rid": rid}).done()).json for rid in ("dog", "fox_1", "nobody")]
    assert [each["sequences_ended_here"] for each in ended] == [2, 1, 0]
    replica.send(opens[0].room, 0, *[TEXT_IDS[0]] * 50, finish=None)
    assert (await router.post("/abort_request", {"rid": "fox"}).done()).json["sequences_ended_here"] == 1
    outputs = (await call.done()).json
    assert [each["meta_info"]["id"] for each in outputs] == ["fox_0", "fox_1", "dog_0", "dog_1"]
    assert {each["meta_info"]["finish_reason"]["type"] for each in outputs} == {"abort"}
    await router.idle()


async def test_a_chat_is_ended_by_its_name_or_the_id_of_its_response(router: RouterHarness) -> None:
    replica = await router.add("one", ReplicaRole.AGGREGATED)
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "stream": True, "max_tokens": 50, "rid": "mine"}
    for name in ("id", "rid"):
        call = router.post("/v1/chat/completions", body)
        opened = await replica.opened(OpenGenerate)
        replica.send(opened.room, 0, TEXT_IDS[0])
        await call.shows("the")
        await router.post("/abort_request", {"rid": call.events[0]["id"] if name == "id" else "mine"}).done()
        assert (await call.done()).events[-2]["choices"][0]["finish_reason"] == "abort"


async def test_a_request_is_ended_at_the_router_that_has_it(tmp_path: Path) -> None:
    posted: list[Event] = []
    links = PeerLinks(
        secret=SECRET,
        identity=Identity(role=LinkRole.REPLICA, peer_id="replica", boot=1),
        post=posted.append,
        attach=lambda address, region: None,
        detach=lambda address: None,
        loop=asyncio.get_running_loop(),
    )
    server = LinkServer(
        secret=SECRET,
        replica_id="replica",
        boot=1,
        region=None,
        on_up=links.accepted,
        on_message=links.received,
        on_lost=links.lost,
    )
    address = await server.start(host="127.0.0.1")
    member = Member(address=address, role=ReplicaRole.AGGREGATED, page_size=16, max_total_tokens=1600)
    async with running_router(tmp_path / "a") as asked, running_router(tmp_path / "b") as owner:
        for each in (asked, owner):
            each.app.state.members.update([member])
            await until(lambda each=each: each.app.state.members.is_whole)  # type: ignore[misc]
        call = owner.post("/generate", {"text": "a fox", "rid": "mine", **LONG})
        spared = asked.post("/generate", {"text": "a dog", "rid": "another", **LONG})
        await until(lambda: sum(isinstance(event, Received) for event in posted) == 2)
        assert (await asked.post("/abort_request", {"rid": "mine"}).done()).json["sequences_ended_here"] == 0
        assert (await call.done()).json["meta_info"]["finish_reason"]["type"] == "abort"
        assert not spared.task.done()
        await asked.post("/abort_request", {"rid": "another"}).done()
        await spared.done()
        links.close()
        server.close()


async def test_abort_wants_to_know_what(router: RouterHarness) -> None:
    refusal = await router.post("/abort_request", {}).done()
    assert (refusal.status, refusal.json["error"]["param"]) == (400, "rid")


async def test_caches_are_flushed_when_nothing_is_under_way(router: RouterHarness) -> None:
    prefill, decode = await router.pair(automatic=True)
    await router.complete(prompt="the quick brown fox " * 20, max_tokens=2).done()
    assert len(router.view(prefill).prefixes) > 0
    prefill.busy_rooms = 1
    busy = await router.get("/flush_cache").done()
    assert (busy.status, busy.json["error"]["code"]) == (400, "busy")
    assert "prefill-0" in busy.json["error"]["message"]
    assert "decode-" not in busy.json["error"]["message"]
    assert len(router.view(prefill).prefixes) > 0
    waiting = router.post("/flush_cache?timeout=9", b"")
    await until(lambda: len(router.dispatcher.flush._waiting) > 0)
    prefill.busy_rooms = 0
    done = await waiting.done()
    assert done.status == 200
    assert done.json["replicas"]["prefill-0"] == {"pages": 7, "open_rooms": 0}
    assert len(router.view(prefill).prefixes) == len(router.view(decode).prefixes) == 0


async def test_a_replica_that_is_lost_during_a_flush_has_not_answered(router: RouterHarness) -> None:
    replica = await router.add("one", ReplicaRole.AGGREGATED)
    replica.busy_rooms = 1
    call = router.get("/flush_cache?timeout=9")
    await until(lambda: len(router.dispatcher.flush._waiting) > 0)
    replica.die()
    assert (await call.done()).status == 400


@pytest.mark.parametrize("given", ["soon", "-1", "nan", "inf"])
async def test_a_timeout_that_is_no_time_is_refused(router: RouterHarness, given: str) -> None:
    call = await router.get(f"/flush_cache?timeout={given}").done()
    assert (call.status, call.json["error"]["param"]) == (400, "timeout")


async def test_what_the_server_tells_of_itself(router: RouterHarness) -> None:
    for path in ("/liveness", "/version"):
        assert (await router.get(path).done()).status == 200
    for path in ("/readiness", "/ping", "/health"):
        assert (await router.get(path).done()).status == 503
    await router.pair()
    for path in ("/readiness", "/ping", "/health"):
        assert (await router.get(path).done()).status == 200
    card = (await router.get("/v1/models/tiny").done()).json
    assert (card["id"], card["max_model_len"], card["context_length"]) == ("tiny", 256, 256)
    assert (await router.get("/v1/models").done()).json["data"] == [card]
    for path in ("/model_info", "/get_model_info"):
        info = (await router.get(path).done()).json
        assert (info["model_path"], info["is_generation"]) == ("tiny", True)
    for path in ("/server_info", "/get_server_info"):
        call = await router.get(path).done()
        assert {each["role"] for each in call.json["internal_states"]} == {"prefill", "decode"}
        assert call.json["router"]["max_body_bytes"] == RouterConfig.max_body_bytes
        assert "secret" not in call.json["router"]
        assert SECRET.decode() not in call.body.decode()


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


async def test_a_request_whose_tokens_have_all_come_is_not_ended(router: RouterHarness) -> None:
    await router.pair(automatic=True)
    done = await router.post("/generate", {"text": "a", "rid": "mine", **LONG}).done()
    assert done.json["text"] == TEXT
    assert len(router.dispatcher.requests) == 0
