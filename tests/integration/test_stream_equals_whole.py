"""A stream, joined, is the whole answer: text, calls, reasoning, log-probabilities, token ids and usage.

The embedded model by PD, over a socket, at temperature 1 with a seed, one choice and two. Both requests of a pair have
a salt of their own, so neither finds anything in a cache that the other does not.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import pytest_asyncio
import uvicorn

from engine.config import EngineConfig
from engine.model.embedded import default_model_folder, fetch_embedded_model
from protocol.membership import ReplicaRole
from tests.integration.worker_cluster import ReplicaSpec, worker_cluster

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

ENGINE = EngineConfig(max_total_tokens=16_384, chunked_prefill_size=512)
_WAIT_S = 60.0
_SALTS = map(str, itertools.count())
CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"

QUESTION = [{"role": "user", "content": "Tell me about the sea in two sentences, with an emoji."}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "the weather", "parameters": SCHEMA}}


def _thoughts(question: str, thought: str, answer: str) -> list[dict[str, str]]:
    said = f"<think>\n{thought}\n</think>\n\n{answer}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": said}]


THINKING = [
    *_thoughts("What is the capital of France?", "They ask for France. Its capital is Paris.", "Paris."),
    *_thoughts("What is the capital of Spain?", "They ask for Spain. Its capital is Madrid.", "Madrid."),
    *_thoughts("What is the capital of Italy?", "They ask for Italy. Its capital is Rome.", "Rome."),
    {"role": "user", "content": "What is the capital of Germany?"},
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    folder = fetch_embedded_model(default_model_folder())
    specs = [ReplicaSpec(role=role, engine=ENGINE) for role in (ReplicaRole.PREFILL, ReplicaRole.DECODE)]
    async with worker_cluster(folder, specs, reasoning_parser="qwen3") as cluster:
        server = uvicorn.Server(uvicorn.Config(cluster.app, lifespan="off", log_level="warning"))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            task = asyncio.create_task(server.serve(sockets=[listener]))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=_WAIT_S, trust_env=False) as over_a_socket:
                yield over_a_socket
            await cluster.assert_idle()
            server.should_exit = True
            await asyncio.wait_for(task, _WAIT_S)


@dataclass(frozen=True)
class Pair:
    """One request, answered whole and as the events of a stream."""

    whole: Any
    events: list[Any]


async def _asked(client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> Pair:
    answer = await client.post(path, json={**body, "cache_salt": next(_SALTS)})
    assert answer.status_code == 200, answer.text
    datas: list[str] = []
    async with client.stream("POST", path, json={**body, "stream": True, "cache_salt": next(_SALTS)}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        async for line in stream.aiter_lines():
            name, _, value = line.partition(": ")
            if name == "data":
                datas.append(value)
    assert datas.pop() == "[DONE]"
    return Pair(answer.json(), [json.loads(data) for data in datas])


def _same(found: Any, wanted: Any, place: str = "") -> None:
    """Equal, and numbers that are not whole nearly so: two requests need not share the same steps."""
    if isinstance(wanted, float) and isinstance(found, float):
        assert math.isclose(found, wanted, abs_tol=1e-4), (place, found, wanted)
    elif isinstance(wanted, dict) and isinstance(found, dict):
        assert list(found) == list(wanted), place
        for name in wanted:
            _same(found[name], wanted[name], f"{place}.{name}")
    elif isinstance(wanted, list) and isinstance(found, list):
        assert len(found) == len(wanted), (place, found, wanted)
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            _same(one, other, f"{place}[{index}]")
    else:
        assert found == wanted, place


# ---- chat -------------------------------------------------------------------------------------------------------


def _joined_message(deltas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a client makes of the deltas of one choice; ids of calls differ between two requests."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": []}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["calls"]):
                assert call["id"]
                message["calls"].append({"name": call["function"]["name"], "arguments": ""})
            message["calls"][call["index"]]["arguments"] += call["function"].get("arguments", "")
    return message


def _joined_chat(events: Sequence[Any]) -> list[dict[str, Any]]:
    parts: dict[int, list[Any]] = {}
    for event in events:
        for choice in event["choices"]:
            parts.setdefault(choice["index"], []).append(choice)
    told = []
    for _, pieces in sorted(parts.items()):
        ends = [piece for piece in pieces if piece["finish_reason"] is not None]
        assert ends == pieces[-1:], "it ends once, at the end"
        logprobs = [entry for piece in pieces if piece["logprobs"] for entry in piece["logprobs"]["content"]]
        ids = [token for piece in pieces for token in piece.get("token_ids", ())]
        end = {name: ends[0][name] for name in ("finish_reason", "matched_stop")}
        told.append({**_joined_message([p["delta"] for p in pieces]), "logprobs": logprobs, "token_ids": ids, **end})
    return told


def _whole_chat(answer: Any) -> list[dict[str, Any]]:
    told = []
    for choice in answer["choices"]:
        message = choice["message"]
        calls = [
            {name: call["function"][name] for name in ("name", "arguments")} for call in message.get("tool_calls", ())
        ]
        said = {"content": message["content"] or "", "reasoning_content": message.get("reasoning_content", "")}
        logprobs = choice["logprobs"]["content"] if choice["logprobs"] else []
        end = {name: choice[name] for name in ("finish_reason", "matched_stop")}
        told.append({**said, "calls": calls, "logprobs": logprobs, "token_ids": choice.get("token_ids", []), **end})
    return told


async def _chat(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a chat, which are the same streamed and whole."""
    body = {"messages": QUESTION, "max_tokens": 24, "seed": 1, "stream_options": {"include_usage": True}, **fields}
    pair = await _asked(client, CHAT, body)
    *events, last = pair.events
    assert all(event["usage"] is None for event in events)
    assert (last["choices"], last["usage"]) == ([], pair.whole["usage"])
    choices = _whole_chat(pair.whole)
    _same(_joined_chat(events), choices)
    return choices


@pytest.mark.parametrize("n", [1, 2])
async def test_chat(client: httpx.AsyncClient, n: int) -> None:
    choices = await _chat(client, n=n, logprobs=True, top_logprobs=3, return_token_ids=True)
    assert [len(choice["logprobs"]) for choice in choices] == [
        len(choice["token_ids"]) - (choice["finish_reason"] == "stop") for choice in choices
    ]
    assert len({choice["content"] for choice in choices}) == n
    plain = await _chat(client, n=n, stop=["sea", "ocean"])
    assert [choice["finish_reason"] for choice in plain] == ["stop"] * n
    assert not any(word in choice["content"] for choice in plain for word in ("sea", "ocean"))


@pytest.mark.parametrize("n", [1, 2])
async def test_calls(client: httpx.AsyncClient, n: int) -> None:
    question = [{"role": "user", "content": "What is the weather in Paris for three days?"}]
    fields = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 80}
    choices = await _chat(client, messages=question, n=n, logprobs=True, **fields)
    calls = [call for choice in choices for call in choice["calls"] if choice["finish_reason"] == "tool_calls"]
    assert calls, "one at least is whole"
    assert all(json.loads(call["arguments"]).keys() == {"city", "days"} for call in calls)


@pytest.mark.parametrize("n", [1, 2])
async def test_reasoning(client: httpx.AsyncClient, n: int) -> None:
    choices = await _chat(client, messages=THINKING, n=n, max_tokens=48, temperature=0.5, logprobs=True)
    assert all(choice["reasoning_content"] for choice in choices)
    assert any(choice["content"] for choice in choices), "one at least has thought to the end"
    assert not any(
        tag in choice[part]
        for choice in choices
        for tag in ("<think>", "</think>")
        for part in ("content", "reasoning_content")
    )


async def test_an_answer_in_a_format(client: httpx.AsyncClient) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}}
    for choice in await _chat(client, n=2, response_format=wanted, max_tokens=60, messages=THINKING[-1:]):
        assert choice["content"] or choice["reasoning_content"]


# ---- completions ------------------------------------------------------------------------------------------------


def _joined_completion(events: Sequence[Any]) -> list[dict[str, Any]]:
    told: dict[int, dict[str, Any]] = {}
    for event in events:
        for piece in event["choices"]:
            choice = told.setdefault(piece["index"], {"text": "", "logprobs": None, "token_ids": []})
            assert "finish_reason" not in choice, "nothing comes after the end"
            choice["text"] += piece["text"]
            choice["token_ids"] += piece.get("token_ids", [])
            if piece["logprobs"] is not None:
                before = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
                choice["logprobs"] = {name: before[name] + piece["logprobs"][name] for name in before}
            if piece["finish_reason"] is not None:
                choice |= {name: piece[name] for name in ("finish_reason", "matched_stop")}
    return [told[index] for index in sorted(told)]


def _whole_completion(answer: Any) -> list[dict[str, Any]]:
    names = ("text", "logprobs", "token_ids", "finish_reason", "matched_stop")
    return [{name: choice.get(name, []) for name in names} for choice in answer["choices"]]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "The sea is", "stop": [" and"]},
        {"prompt": ["The sea is", "Once upon a time"], "logprobs": 3, "return_token_ids": True},
        {"prompt": "The lighthouse keeper wrote in his log", "echo": True, "logprobs": 2},
    ],
    ids=["plain", "logprobs", "echo"],
)
async def test_completions(client: httpx.AsyncClient, n: int, fields: dict[str, Any]) -> None:
    body = {"max_tokens": 12, "seed": 3, "n": n, "stream_options": {"include_usage": True}, **fields}
    pair = await _asked(client, COMPLETIONS, body)
    *events, last = pair.events
    assert last["usage"] == pair.whole["usage"]
    choices = _whole_completion(pair.whole)
    _same(_joined_completion(events), choices)
    assert len(choices) == n * (len(fields["prompt"]) if isinstance(fields["prompt"], list) else 1)
    if "echo" in fields:
        assert all(choice["text"].startswith(fields["prompt"]) for choice in choices)
        assert all(choice["logprobs"]["token_logprobs"][0] is None for choice in choices)


# ---- /generate --------------------------------------------------------------------------------------------------


def _comparable(output: Mapping[str, Any]) -> dict[str, Any]:
    """Without what one request alone has: its name, its time, and, of a second choice, what the first had cached."""
    meta = {name: output["meta_info"][name] for name in output["meta_info"] if name not in _OF_ONE_REQUEST}
    return {"text": output["text"], "output_ids": output["output_ids"], "meta_info": meta}


_OF_ONE_REQUEST = ("id", "e2e_latency", "cached_tokens")


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "fields",
    [
        {"text": "The sea is"},
        {"text": ["The sea is", "Once upon a time"], "return_logprob": True, "top_logprobs_num": 2},
        {
            "text": "The lighthouse keeper wrote in his log",
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 2,
            "token_ids_logprob": [11, 260],
            "return_text_in_logprobs": True,
        },
    ],
    ids=["plain", "batch", "scored"],
)
async def test_generate_repeats_all_there_is_so_far(client: httpx.AsyncClient, n: int, fields: dict[str, Any]) -> None:
    sampling = {"temperature": 1, "max_new_tokens": 12, "sampling_seed": 5, "n": n, "stop": [" the"]}
    pair = await _asked(client, GENERATE, {**fields, "sampling_params": sampling})
    outputs = pair.whole if isinstance(pair.whole, list) else [pair.whole]
    last: dict[int, Any] = {}
    for event in pair.events:
        index = event.get("index", 0)
        before = last.get(index)
        if before is not None:
            assert before["meta_info"]["finish_reason"] is None, "nothing comes after the end"
            assert event["text"].startswith(before["text"])
            assert event["output_ids"][: len(before["output_ids"])] == before["output_ids"]
            assert len(event["output_ids"]) == event["meta_info"]["completion_tokens"]
            _same(event["meta_info"].get("input_token_logprobs"), before["meta_info"].get("input_token_logprobs"))
        last[index] = event
    assert len(outputs) == n * (len(fields["text"]) if isinstance(fields["text"], list) else 1)
    for index, output in enumerate(outputs):
        _same(_comparable(last[index]), _comparable(output))
