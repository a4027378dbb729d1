"""The embedded model made to call tools, through the official client: by PD, streamed and whole, at temperature 1."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import pytest_asyncio

from engine.config import EngineConfig
from protocol.membership import ReplicaRole
from tests.integration.worker_cluster import MODEL_NAME, ReplicaSpec, WorkerCluster, worker_cluster

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

ENGINE = EngineConfig(max_total_tokens=16_384, chunked_prefill_size=512)
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 9}, "maxItems": 3},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "get_time": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": f"{name} anywhere", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
MESSAGES: Any = [{"role": "user", "content": "What is the weather in Paris, and how late is it?"}]
SEEDS = range(2)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(folder: Path) -> AsyncIterator[WorkerCluster]:
    roles = (ReplicaRole.PREFILL, ReplicaRole.DECODE)
    async with worker_cluster(folder, [ReplicaSpec(role=role, engine=ENGINE) for role in roles]) as running:
        yield running
        await running.assert_idle()


def client(cluster: WorkerCluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url="http://router/v1", api_key="none", http_client=cluster.client, max_retries=0, timeout=300
    )


def check(message: Any, *, names: set[str], whole: bool = True) -> None:
    """Every call is one of `names` and has arguments that its schema allows; the last one only if all is `whole`."""
    assert message.tool_calls
    assert message.content is None
    for call in message.tool_calls if whole else message.tool_calls[:-1]:
        assert call.function.name in names
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


async def test_calls_that_are_required_named_or_alone(cluster: WorkerCluster) -> None:
    api = client(cluster)

    ended: list[str] = []

    async def ask(seed: int, names: set[str], **fields: Any) -> None:
        common: Any = {"model": MODEL_NAME, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 160, "seed": seed}
        whole = (await api.chat.completions.create(**common, **fields)).choices[0]
        check(whole.message, names=names, whole=whole.finish_reason == "tool_calls")
        ended.append(whole.finish_reason)
        streamed: dict[int, tuple[str, str]] = {}
        finish = None
        async for chunk in await api.chat.completions.create(stream=True, **common, **fields):
            choice = chunk.choices[0]
            assert choice.delta.content is None
            finish = finish or choice.finish_reason
            for call in choice.delta.tool_calls or []:
                assert call.function is not None
                name, arguments = streamed.get(call.index, (call.function.name or "", ""))
                streamed[call.index] = name, arguments + (call.function.arguments or "")
        calls = whole.message.tool_calls or []
        assert list(streamed.values()) == [(call.function.name, call.function.arguments) for call in calls]
        assert finish == whole.finish_reason

    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    await asyncio.gather(
        *(ask(seed, set(SCHEMAS), tool_choice="required", parallel_tool_calls=False) for seed in SEEDS),
        *(ask(seed, {"get_weather"}, tool_choice=named) for seed in SEEDS),
        ask(0, set(SCHEMAS), tool_choice="required"),
    )
    assert ended.count("tool_calls") >= 2 * len(SEEDS), "a call alone ends"


async def test_a_conversation_with_a_tool(cluster: WorkerCluster) -> None:
    api = client(cluster)
    common: Any = {"model": MODEL_NAME, "tools": TOOLS, "temperature": 0, "max_tokens": 200}
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    first = await api.chat.completions.create(messages=MESSAGES, tool_choice=named, **common)
    assert first.choices[0].finish_reason == "tool_calls"
    (call,) = first.choices[0].message.tool_calls or []
    result = {"role": "tool", "tool_call_id": call.id, "content": "12 degrees and rain"}
    history: Any = [*MESSAGES, first.choices[0].message, result]
    second = await api.chat.completions.create(messages=history, tool_choice="none", **common)
    assert second.choices[0].message.content
    assert not second.choices[0].message.tool_calls


async def test_an_answer_in_a_format_or_a_call(cluster: WorkerCluster) -> None:
    api = client(cluster)
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    answers = await asyncio.gather(
        *(
            api.chat.completions.create(
                model=MODEL_NAME,
                messages=MESSAGES,
                tools=TOOLS,
                response_format=wanted,
                parallel_tool_calls=False,
                max_tokens=160,
                seed=seed,
            )
            for seed in SEEDS
        )
    )
    for answer in answers:
        message, finish = answer.choices[0].message, answer.choices[0].finish_reason
        if finish == "tool_calls":
            check(message, names=set(SCHEMAS))
        elif finish == "stop":
            jsonschema.validate(json.loads(message.content or ""), schema)
        else:
            assert finish == "length"
