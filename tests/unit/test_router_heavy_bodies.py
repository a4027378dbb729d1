"""Bodies of millions of values are refused before anybody looks at each of them: the event loop is everybody's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from router_harness import TEXT_IDS, Call, RouterHarness, running_router, until

from protocol.membership import ReplicaRole
from protocol.rooms import OpenGenerate
from protocol.sampling import FinishReason
from router.api import prompts
from router.api.fields import shown

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
MANY = 1 << 17
MESSAGE = {"role": "user", "content": "hi"}


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterHarness]:
    async with running_router(tmp_path, max_sequences_per_request=8) as harness:
        await harness.add("both", ReplicaRole.AGGREGATED, automatic=True)
        yield harness


async def refused(router: RouterHarness, path: str, body: dict[str, Any]) -> dict[str, Any]:
    call = await router.post(path, body).done()
    assert call.status == 400, call.body
    error: dict[str, Any] = call.json["error"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [0] * MANY}, "messages"),
        (CHAT, {"messages": [MESSAGE] * (MANY // 3)}, "messages"),
        (CHAT, {"messages": [{**MESSAGE, "content": [{"type": "text", "text": "a"}] * MANY}]}, "messages"),
        (CHAT, {"messages": [{**MESSAGE, **{f"x{number}": 1 for number in range(MANY)}}]}, "messages"),
        (CHAT, {"messages": [MESSAGE], "metadata": {str(number): 1 for number in range(MANY)}}, "metadata"),
        (COMPLETIONS, {"prompt": "hi", "logit_bias": {str(number): "x" for number in range(MANY)}}, "logit_bias"),
        (GENERATE, {"text": "hi", "rid": [0] * MANY}, "rid"),
        (GENERATE, {"text": "hi", "sampling_params": [0] * MANY}, "sampling_params"),
        ("/tokenize", {"messages": [0] * MANY}, "messages"),
    ],
)
async def test_the_values_of_a_field_are_counted_first(
    router: RouterHarness, path: str, body: dict[str, Any], param: str
) -> None:
    error = await refused(router, path, body)
    assert error["param"] == param
    assert "more than 65536 values" in error["message"]


async def test_a_long_list_that_is_no_prompt_is_refused(router: RouterHarness) -> None:
    error = await refused(router, COMPLETIONS, {"prompt": ["a", *[5] * 7]})
    assert "is no prompt" in error["message"]
    assert "131073 prompts" in (await refused(router, COMPLETIONS, {"prompt": ["a", *[5] * MANY]}))["message"]


async def test_only_so_many_texts_are_tokenised_at_a_time(router: RouterHarness) -> None:
    error = await refused(router, "/tokenize", {"prompt": ["a"] * 9})
    assert "9 prompts are over the limit of 8" in error["message"]
    call = await router.post("/tokenize", {"prompt": ["a"] * 8, "return_token_strs": True}).done()
    assert call.status == 200
    assert call.json["token_strs"] == [["<s>", "a"]] * 8


async def test_only_so_many_tokens_are_made_of_one_request(
    router: RouterHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_MOST_TOKENS", 10)
    for path in ("/tokenize", COMPLETIONS):
        assert "more than 10 tokens" in (await refused(router, path, {"prompt": ["abc " * 4, "def " * 4]}))["message"]
    assert (await router.post("/tokenize", {"prompt": "abc"}).done()).status == 200


async def test_a_wrong_id_is_named_with_its_place(router: RouterHarness) -> None:
    error = await refused(router, COMPLETIONS, {"prompt": [5] * MANY + [-3, 5, 99999]})
    assert f"-3 at position {MANY}" in error["message"]
    assert "is no prompt" in (await refused(router, COMPLETIONS, {"prompt": [5, True]}))["message"]


def test_no_more_of_a_value_is_written_than_is_shown() -> None:
    assert shown(["a"] * 100 + [object()]).startswith('["a", "a"')
    assert shown("é" * 500) == '"' + "é" * 96 + "..."
    assert shown({"a": [1, None]}) == '{"a": [1, null]}'


async def test_bodies_that_are_being_read_have_a_bounded_space(tmp_path: Path) -> None:
    async with running_router(tmp_path, max_body_bytes=6000, max_bodies_bytes=10_000) as router:
        replica = await router.add("both", ReplicaRole.AGGREGATED)
        body = {"prompt": "a fox", "max_tokens": 5, "stream": True, "user": "x" * 5000}
        slow = Call(router.app, "POST", COMPLETIONS, b"{" * 5500, {}, whole=False)
        await until(lambda: space_taken(router) == 5500)
        refusal = await router.post(COMPLETIONS, body).done()
        assert (refusal.status, refusal.json["error"]["code"]) == (429, "too_many_bytes")
        assert refusal.headers["retry-after"] == "1"
        slow.leave()
        await until(lambda: space_taken(router) == 0)
        # While it is generated a request takes none: there could be many.
        calls = [router.post(COMPLETIONS, body) for _ in range(3)]
        rooms = [(await replica.opened(OpenGenerate)).room for _ in calls]
        assert space_taken(router) == 0
        for room in rooms:
            replica.send(room, 0, TEXT_IDS[0], finish=FinishReason.LENGTH)
        assert [(await call.done()).status for call in calls] == [200, 200, 200]


def space_taken(router: RouterHarness) -> float:
    return next(gauge.read() for gauge in router.metrics.gauges if gauge.name == "router_body_bytes")
