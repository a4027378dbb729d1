"""Streams with scores of their prompts are come back to like others: told again as they were, and scored once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from router_harness import END_ID, TEXT_IDS, Call, FakeReplica, Open, scores_of
from stream_harness import ALICE, KEYS, came_back, serving, two, until_shown

from protocol.rooms import OpenGenerate, PromptScores
from protocol.sampling import FinishReason

GENERATE = ("/generate", {"text": "a fox", "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2})
COMPLETE = ("/v1/completions", {"prompt": "a fox", "echo": True, "logprobs": 2, "max_tokens": 100})


def body(fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**fields, "stream": True, **more}


def score(replica: FakeReplica, opened: Open) -> None:
    assert opened.job.scoring is not None
    replica.link.send(PromptScores(opened.room, scores_of(opened.job.prompt, opened.job.scoring)))


def told(call: Call) -> list[tuple[str, Any]]:
    """(id, event) without what is of the moment."""
    events = [json.loads(json.dumps(event)) for event in call.events]
    for event in events:
        if event != "[DONE]":
            event.get("meta_info", {}).pop("e2e_latency", None)
    return list(zip(call.ids, events, strict=True))


@pytest.mark.parametrize(("path", "fields"), [GENERATE, COMPLETE], ids=["generate", "completions"])
async def test_the_scores_are_told_again(tmp_path: Path, path: str, fields: dict[str, Any]) -> None:
    async with serving(tmp_path) as (router, replica):
        first = router.post(path, body(fields))
        opened = await replica.opened(OpenGenerate)
        score(replica, opened)
        for position in range(2):
            replica.send(opened.room, position, TEXT_IDS[position], logprob=-0.5)
            await until_shown(first, position + 1)
        first.leave()
        await first.task
        second = came_back(router, first, seen=0)
        again = await replica.opened(OpenGenerate)
        assert (again.room.epoch, again.job.logged, again.job.scoring) == (1, TEXT_IDS[:2], None)
        replica.send(again.room, 2, END_ID, finish=FinishReason.STOP_TOKEN)
        await second.done()
        assert told(second)[:2] == told(first)
        assert second.events[-1] == "[DONE]"
        assert (await came_back(router, second, seen=2).done()).events[-1] == "[DONE]"
        await router.idle()


async def test_a_stream_that_had_no_scores_yet_is_not_kept(tmp_path: Path) -> None:
    async with serving(tmp_path) as (router, replica):
        first = router.post("/generate", body(GENERATE[1]))
        await replica.opened(OpenGenerate)
        first.leave()
        await first.task
        await router.idle()
        (kept,) = (gauge for gauge in router.metrics.gauges if gauge.name == "router_kept_streams")
        assert kept.read() == 0


async def test_choices_that_waited_for_the_scores_are_told_again_in_the_same_events(tmp_path: Path) -> None:
    async with serving(tmp_path) as (router, replica):
        first = router.post("/generate", body(GENERATE[1], sampling_params={"n": 2}))
        rooms = [(await replica.opened(OpenGenerate)) for _ in range(2)]
        for position in range(3):
            replica.send(rooms[1].room, position, TEXT_IDS[position], choice=1, logprob=-0.5)
            await router.get("/v1/models").done()
        score(replica, rooms[0])
        replica.send(rooms[0].room, 0, TEXT_IDS[0], logprob=-0.5)
        await until_shown(first, 2)
        first.leave()
        await first.task
        second = came_back(router, first, seen=1)
        again = [await replica.opened(OpenGenerate) for _ in range(2)]
        assert [(each.job.logged, each.job.scoring) for each in again] == [(TEXT_IDS[:1], None), (TEXT_IDS[:3], None)]
        await until_shown(second, 1)
        assert told(second) == told(first)[1:]
        for index, each in enumerate(again):
            position = len(each.job.logged)
            replica.send(each.room, position, END_ID, finish=FinishReason.STOP_TOKEN, choice=index, logprob=-0.5)
        await second.done()
        await router.idle()


async def test_scores_move_along_to_another_router(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps(KEYS))
    async with two(tmp_path, keys) as ((one, one_replica), (other, other_replica)):
        first = one.post("/generate", body(GENERATE[1]), headers=ALICE)
        opened = await one_replica.opened(OpenGenerate)
        score(one_replica, opened)
        one_replica.send(opened.room, 0, TEXT_IDS[0], logprob=-0.5)
        await until_shown(first, 1)
        second = came_back(other, first, seen=0, headers=ALICE)
        again = await other_replica.opened(OpenGenerate)
        assert (again.job.logged, again.job.scoring) == (TEXT_IDS[:1], None)
        other_replica.send(again.room, 1, END_ID, finish=FinishReason.STOP_TOKEN)
        await second.done()
        assert told(second)[:1] == told(first)
        final = second.events[-2]["meta_info"]
        assert final["input_token_logprobs"] == first.events[0]["meta_info"]["input_token_logprobs"]
