"""A stream, joined, is the whole answer: text, calls, reasoning, log-probabilities, token ids and usage.

The embedded model by PD, over a socket, at temperature 1 with a seed, one choice and two. Both requests of a pair have
a salt of their own, so neither finds anything in a cache that the other does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from engine.config import EngineConfig
from engine.model.embedded import default_model_folder, fetch_embedded_model
from protocol.membership import ReplicaRole
from router.api.token_bans import bad_word_ids
from tests.integration.over_a_socket import asked, over_a_socket, read, same, streamed
from tests.integration.stream_joining import joined_chat, joined_completion, whole_chat, whole_completion
from tests.integration.worker_cluster import ReplicaSpec, worker_cluster
from text.tokenizer import Tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

ENGINE = EngineConfig(max_total_tokens=16_384, chunked_prefill_size=512)
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


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    folder = fetch_embedded_model(default_model_folder())
    specs = [ReplicaSpec(role=role, engine=ENGINE) for role in (ReplicaRole.PREFILL, ReplicaRole.DECODE)]
    async with worker_cluster(folder, specs, reasoning_parser="qwen3") as cluster:
        async with over_a_socket(cluster) as made:
            yield made
        await cluster.assert_idle()


# ---- chat -------------------------------------------------------------------------------------------------------


async def _chat(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a chat, which are the same streamed and whole."""
    body = {"messages": QUESTION, "max_tokens": 24, "seed": 1, "stream_options": {"include_usage": True}, **fields}
    pair = await asked(client, CHAT, body)
    *events, last = pair.events
    assert all(event["usage"] is None for event in events)
    assert (last["choices"], last["usage"]) == ([], pair.whole["usage"])
    choices = whole_chat(pair.whole)
    same(joined_chat(events), choices)
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
    choices = await _chat(client, messages=THINKING, n=n, max_tokens=48, logprobs=True)
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
    pair = await asked(client, COMPLETIONS, body)
    *events, last = pair.events
    assert last["usage"] == pair.whole["usage"]
    choices = whole_completion(pair.whole)
    same(joined_completion(events), choices)
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
    pair = await asked(client, GENERATE, {**fields, "sampling_params": sampling})
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
            same(event["meta_info"].get("input_token_logprobs"), before["meta_info"].get("input_token_logprobs"))
        last[index] = event
    assert len(outputs) == n * (len(fields["text"]) if isinstance(fields["text"], list) else 1)
    for index, output in enumerate(outputs):
        same(_comparable(last[index]), _comparable(output))


@pytest.mark.parametrize("n", [1, 2])
async def test_a_scored_stream_goes_on_where_it_was_cut_off(client: httpx.AsyncClient, n: int) -> None:
    sampling = {"temperature": 1, "max_new_tokens": 12, "sampling_seed": 5, "n": n}
    body = {
        "text": "The lighthouse keeper wrote in his log",
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "sampling_params": sampling,
    }
    pair = await asked(client, GENERATE, body)
    events = await read(client, streamed(client, GENERATE, body), most=3)
    while events[-1][1] != "[DONE]":
        last = events[-1][0]
        path = f"/v1/streams/{last.partition(':')[0]}"
        events += await read(client, client.build_request("GET", path, headers={"Last-Event-ID": last}), most=4)
    numbers = [int(name.partition(":")[2].partition(".")[0]) for name, _ in events]
    assert numbers == list(range(1, len(events) + 1))
    outputs = pair.whole if n > 1 else [pair.whole]
    told = {event.get("index", 0): event for _, event in events[:-1]}
    for index, output in enumerate(outputs):
        same(_comparable(told[index]), _comparable(output))


# ---- what may not come, and what ends the text --------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
async def test_only_allowed_tokens(client: httpx.AsyncClient, tokenizer: Tokenizer, n: int) -> None:
    allowed = tokenizer.encode("0 1 2 3 4 5 6 7 8 9 sea", add_special_tokens=False)
    choices = await _chat(client, n=n, allowed_token_ids=allowed, return_token_ids=True, logprobs=True)
    assert all(set(choice["token_ids"]) <= set(allowed) for choice in choices)
    assert all(len(choice["token_ids"]) == 24 for choice in choices), "the end is not among them"


@pytest.mark.parametrize("n", [1, 2])
async def test_bad_words_and_a_stop_regex_over_a_hand_over_and_a_cut(
    client: httpx.AsyncClient, tokenizer: Tokenizer, n: int
) -> None:
    """The first token comes from prefill, the others from decode, and those after each cut from another epoch."""
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": 40, "n": n, "ignore_eos": True}
    body = {"text": "Once upon a time there was a", "sampling_params": sampling}
    free = (await asked(client, GENERATE, body)).whole
    text = (free if n == 1 else free[0])["text"]
    words = [word for word in re.findall(r"[a-z]+", text) if text.count(word) == 1]
    sampling["bad_words"] = [words[0], words[2], " ".join(words[4:6])]
    banned = bad_word_ids(sampling["bad_words"], tokenizer)
    whole = (await asked(client, GENERATE, body)).whole
    text = (whole if n == 1 else whole[0])["text"]
    sampling["stop_regex"] = [re.sub(r"[aeiou]", "[aeiou]", re.findall(r"[a-z]+ [a-z]+ [a-z]+", text)[2]), "[0-9]{30}"]
    pair = await asked(client, GENERATE, body)
    events = await read(client, streamed(client, GENERATE, body), most=2)
    while events[-1][1] != "[DONE]":
        last = events[-1][0]
        path = f"/v1/streams/{last.partition(':')[0]}"
        events += await read(client, client.build_request("GET", path, headers={"Last-Event-ID": last}), most=3)
    told = {event.get("index", 0): event for _, event in events[:-1]}
    outputs = pair.whole if n > 1 else [pair.whole]
    for index, output in enumerate(outputs):
        same(_comparable(told[index]), _comparable(output))
        stop = output["meta_info"]["finish_reason"]
        assert stop == {"type": "stop", "matched": sampling["stop_regex"][0]}
        assert text.startswith(output["text"])
        assert re.match(stop["matched"], text[len(output["text"]) :])
        ids = output["output_ids"]
        assert not any(tuple(ids[place : place + len(word)]) == word for word in banned for place in range(len(ids)))
