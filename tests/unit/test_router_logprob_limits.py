"""Log-probabilities of outputs: how many one request may ask for, and how many the router keeps of all."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from router_harness import TEXT_IDS, RouterHarness, running_router, until

from protocol.membership import ReplicaRole
from protocol.rooms import AbortReason, OpenGenerate
from protocol.sampling import FinishReason

CHAT = {"messages": [{"role": "user", "content": "a fox?"}]}


def kept(router: RouterHarness) -> float:
    (gauge,) = [each for each in router.metrics.gauges if each.name == "router_output_logprobs"]
    count: float = gauge.read()
    return count


@pytest.mark.parametrize(
    ("path", "fields", "param", "limit_name"),
    [
        (
            "/v1/chat/completions",
            {**CHAT, "logprobs": True, "top_logprobs": 4},
            "top_logprobs",
            "max_completion_tokens",
        ),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 4}, "top_logprobs", "max_tokens"),
        ("/v1/completions", {"prompt": "a fox", "logprobs": 4}, "logprobs", "max_tokens"),
        ("/v1/completions", {"prompt": "a fox", "logprobs": 4, "stream": True}, "logprobs", "max_tokens"),
        ("/generate", {"text": "a fox", "return_logprob": True, "top_logprobs_num": 4}, "top_logprobs_num", ""),
        ("/generate", {"text": "a fox", "return_logprob": True, "token_ids_logprob": [5] * 4}, "token_ids_logprob", ""),
    ],
)
async def test_more_than_a_request_may_ask_for_is_refused(
    tmp_path: Path, path: str, fields: dict[str, Any], param: str, limit_name: str
) -> None:
    async with running_router(tmp_path, max_logprobs=2 * 10 * 5) as router:
        await router.add("both", ReplicaRole.AGGREGATED, automatic=True)
        limit_name = limit_name or "max_new_tokens"
        assert (await router.post(path, {**fields, "n": 2, limit_name: 10}).done()).status == 200
        call = await router.post(path, {**fields, "n": 2, limit_name: 11}).done()
    assert call.status == 400, call.body
    error = call.json["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: 2 outputs (prompts times n) of up to 11 tokens ({limit_name}, ")
    assert "with 5 log-probabilities each are 110 numbers, over the limit of 100 a request; lower " in error["message"]


async def test_choices_that_are_only_ranked_count_too(tmp_path: Path) -> None:
    async with running_router(tmp_path, max_logprobs=30) as router:
        await router.add("both", ReplicaRole.AGGREGATED, automatic=True)
        body = {"prompt": "a fox", "max_tokens": 10}
        assert (await router.post("/v1/completions", {**body, "best_of": 3}).done()).status == 200
        call = await router.post("/v1/completions", {**body, "best_of": 4}).done()
        assert (call.status, call.json["error"]["param"]) == (400, "best_of")
        assert (await router.post("/v1/completions", {**body, "n": 4}).done()).status == 200  # asks for none


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_finds_no_space_ends_and_gives_back_what_it_had(tmp_path: Path, stream: bool) -> None:
    async with running_router(tmp_path, max_logprobs=12, max_logprobs_together=16) as router:
        replica = await router.add("both", ReplicaRole.AGGREGATED)
        fields = {"max_tokens": 4, "logprobs": 2, "stream": stream}
        first = router.complete(**fields)
        room = (await replica.opened(OpenGenerate)).room
        replica.send(room, 0, *TEXT_IDS[:3], logprob=-0.5)
        await until(lambda: kept(router) == 9)
        second = router.complete(**fields)
        other = (await replica.opened(OpenGenerate)).room
        replica.send(other, 0, *TEXT_IDS[:2], logprob=-0.5)
        await until(lambda: kept(router) == 15)
        replica.send(other, 2, TEXT_IDS[2], logprob=-0.5)
        assert (await replica.aborted(other)).reason is AbortReason.PEER_FAILED
        await second.done()
        error = second.events[-1]["error"] if stream else second.json["error"]
        assert (second.status, error["code"]) == (200 if stream else 429, "too_many_logprobs")
        assert (
            "under way have asked for are 15 numbers, and this router has space for 16; try again" in error["message"]
        )
        assert kept(router) == 9
        replica.send(room, 3, TEXT_IDS[3], finish=FinishReason.LENGTH, logprob=-0.5)
        assert (await first.done()).status == 200
        assert kept(router) == 0
        await router.idle()


async def test_long_whole_answers_are_written_in_a_thread_and_equal_their_stream(tmp_path: Path) -> None:
    async with running_router(tmp_path, context_length=2048) as router:
        await router.add("both", ReplicaRole.AGGREGATED, automatic=True)
        body = {**CHAT, "max_tokens": len(TEXT_IDS) + 1, "logprobs": True, "top_logprobs": 2, "n": 60}
        whole = await router.post("/v1/chat/completions", body).done()
        stream = await router.post("/v1/chat/completions", {**body, "stream": True}).done()
    streamed: list[list[Any]] = [[] for _ in range(60)]
    for event in stream.events[:-1]:
        (choice,) = event["choices"]
        streamed[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
    told = [choice["logprobs"]["content"] for choice in whole.json["choices"]]
    assert sum(map(len, told)) > 512
    assert told == streamed


async def test_requests_without_logprobs_take_none(tmp_path: Path) -> None:
    async with running_router(tmp_path, max_logprobs=1, max_logprobs_together=1) as router:
        await router.add("both", ReplicaRole.AGGREGATED, automatic=True)
        calls = [router.complete(max_tokens=40) for _ in range(3)]
        await asyncio.gather(*(call.done() for call in calls))
        assert {call.status for call in calls} == {200}
