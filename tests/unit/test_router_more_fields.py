"""Fields of vLLM and SGLang beyond those of OpenAI: what they ask of replicas, and what they add to answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from router_harness import TEXT, TEXT_IDS, TOKENIZER, Call, FakeReplica, RouterHarness, running_router
from tiny_tokenizers import CHAT_TEMPLATE

from protocol.membership import ReplicaRole
from protocol.rooms import OpenGenerate
from protocol.sampling import FinishReason
from protocol.scoring import Scoring

THE = [TOKENIZER.encode(text, add_special_tokens=False)[0] for text in ("the", " the")]
MESSAGES = [{"role": "user", "content": "a fox?"}]
DOCUMENTS = [{"title": "on foxes", "text": "They are quick."}]
WITH_DOCUMENTS = "{% for each in documents or [] %}[{{ each.title }}: {{ each.text }}]{% endfor %}" + CHAT_TEMPLATE

Served = tuple[RouterHarness, FakeReplica]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with running_router(tmp_path) as router:
        yield router, await router.add("both", ReplicaRole.AGGREGATED, automatic=True)


async def answered(call: Call) -> Any:
    assert (await call.done()).status == 200, call.body
    return call.json


async def refused(call: Call, param: str) -> str:
    assert (await call.done()).status == 400, call.body
    assert call.json["error"]["param"] == param
    return str(call.json["error"]["message"])


@pytest.mark.parametrize("name", ["no_stop_trim", "include_stop_str_in_output"])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
async def test_what_ends_the_text_is_shown_by_either_name(served: Served, path: str, name: str) -> None:
    router, replica = served
    asked = {"/generate": {"text": "a fox"}, "/v1/completions": {"prompt": "a fox"}}
    await answered(router.post(path, {**asked.get(path, {"messages": MESSAGES}), name: True}))
    assert replica.opens[-1].job.sampling.include_stop


async def test_documents_go_to_templates_that_know_them(tmp_path: Path) -> None:
    async with running_router(tmp_path, chat_template=WITH_DOCUMENTS) as router:
        replica = await router.add("both", ReplicaRole.AGGREGATED, automatic=True)
        body = {"messages": MESSAGES, "documents": DOCUMENTS}
        await answered(router.post("/v1/chat/completions", body))
        prompt = replica.opens[-1].job.prompt
        assert TOKENIZER.decode(prompt).startswith("[on foxes: They are quick.]")
        assert (await answered(router.post("/tokenize", body)))["tokens"] == prompt


async def test_documents_are_refused_where_the_template_knows_none(served: Served) -> None:
    router, _ = served
    call = router.post("/v1/chat/completions", {"messages": MESSAGES, "documents": DOCUMENTS})
    assert "write them into a message" in await refused(call, "documents")


async def test_a_chats_prompt_can_be_scored(served: Served) -> None:
    router, replica = served
    body = {"messages": MESSAGES, "prompt_logprobs": 2, "n": 2}
    answer = await answered(router.post("/v1/chat/completions", body))
    first, second = replica.opens
    assert (first.job.scoring, second.job.scoring) == (Scoring(1, 2, ranks=True), None)
    told = answer["prompt_logprobs"]
    assert len(told) == len(first.job.prompt)
    assert told[0] is None
    assert told[3][str(first.job.prompt[3])]["logprob"] == -3.0
    call = router.post("/v1/chat/completions", {**body, "stream": True})
    assert "stream out" in await refused(call, "prompt_logprobs")
    plain = await answered(router.post("/v1/chat/completions", {"messages": MESSAGES}))
    assert "prompt_logprobs" not in plain


async def test_of_a_long_prompt_the_last_tokens_stay(served: Served) -> None:
    router, replica = served
    ids = list(range(5, 45))

    async def kept(path: str = "/v1/completions", **fields: Any) -> list[int]:
        await answered(router.post(path, {"max_tokens": 4, **fields}))
        return replica.opens[-1].job.prompt

    assert await kept(prompt=ids, truncate_prompt_tokens=7) == ids[-7:]
    assert await kept(prompt=ids, truncate_prompt_tokens=70) == ids
    assert await kept(prompt=[5] * 1000, truncate_prompt_tokens=-1) == [5] * 252  # with 4 to come, the context is full
    whole = await kept("/v1/chat/completions", messages=MESSAGES)
    assert await kept("/v1/chat/completions", messages=MESSAGES, truncate_prompt_tokens=3) == whole[-3:]
    call = router.post("/v1/completions", {"prompt": ids, "truncate_prompt_tokens": 0})
    assert "no token would be left" in await refused(call, "truncate_prompt_tokens")


async def test_what_is_echoed_is_what_is_left_of_the_prompt(served: Served) -> None:
    router, replica = served
    body = {"prompt": "the lazy dog", "echo": True, "max_tokens": 1, "truncate_prompt_tokens": 2}
    text = (await answered(router.post("/v1/completions", body)))["choices"][0]["text"]
    prompt = replica.opens[-1].job.prompt
    assert len(prompt) == 2
    assert text.startswith(TOKENIZER.decode(prompt))
    assert "lazy dog"[: len(text)] != text


async def test_special_tokens_before_a_prompt_can_be_left_out(served: Served) -> None:
    router, replica = served
    for special in (True, False):
        body = {"prompt": "a fox", "add_special_tokens": special}
        await answered(router.post("/v1/completions", body))
        assert replica.opens[-1].job.prompt == TOKENIZER.encode("a fox", add_special_tokens=special)
    assert len({len(opened.job.prompt) for opened in replica.opens}) == 2


async def test_generate_shows_the_tokens_of_its_prompts(served: Served) -> None:
    router, replica = served
    body = {"text": ["a fox", "the dog"], "return_prompt_token_ids": True}
    outputs = await answered(router.post("/generate", body))
    assert [each["prompt_token_ids"] for each in outputs] == [opened.job.prompt for opened in replica.opens]
    call = await router.post("/generate", {**body, "text": "a fox", "stream": True}).done()
    assert {tuple(event["prompt_token_ids"]) for event in call.events[:-1]} == {tuple(replica.opens[-1].job.prompt)}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_every_event_tells_the_usage_so_far_if_asked(served: Served, path: str) -> None:
    router, _ = served
    options = {"include_usage": True, "continuous_usage_stats": True}
    prompt: dict[str, Any] = {"prompt": "a fox"} if path == "/v1/completions" else {"messages": MESSAGES}
    body = {**prompt, "max_tokens": 6, "stream": True, "stream_options": options}
    call = await router.post(path, body).done()
    *events, last = call.events[:-1]
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert (counts[-1], last["choices"], last["usage"]["completion_tokens"]) == (6, [], 6)
    without = {**body, "stream_options": {"continuous_usage_stats": True}}
    plain = await router.post(path, without).done()
    assert plain.streamed_text == call.streamed_text
    assert not any("usage" in event for event in plain.events[:-1])


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
async def test_what_may_come_and_what_ends_the_text_goes_to_replicas(served: Served, path: str) -> None:
    router, replica = served
    fields = {"stop_regex": r"\d+ dogs", "allowed_token_ids": [5, 7.0, 9], "bad_words": ["the", " lazy dog"]}
    asked = {"/generate": {"text": "a fox"}, "/v1/completions": {"prompt": "a fox"}}
    await answered(router.post(path, {**asked.get(path, {"messages": MESSAGES}), **fields}))
    sampling = replica.opens[-1].job.sampling
    assert (sampling.stop_regex, sampling.allowed_token_ids) == ((r"\d+ dogs",), (5, 7, 9))
    # " lazy dog" has another number of tokens than "lazy dog", and vLLM leaves it free.
    assert [TOKENIZER.decode(each) for each in sampling.bad_words] == ["the", " the", "lazy dog"]


async def test_a_stop_regex_ends_a_streams_text_and_is_its_reason(served: Served) -> None:
    router, replica = served
    replica.automatic = False
    for stream in (True, False):
        call = router.complete(stop_regex=["jump[a-z]*", "never"], stream=stream, max_tokens=len(TEXT_IDS))
        room = (await replica.opened(OpenGenerate)).room
        for number, token in enumerate(TEXT_IDS):
            text = TOKENIZER.decode(TEXT_IDS[: number + 1])
            finish = FinishReason.STOP_STRING if "jump" in text else None
            replica.send(room, number, token, finish=finish, matched="jump[a-z]*" if finish else None)
            if finish:
                break
        await call.done()
        text = call.streamed_text if stream else call.json["choices"][0]["text"]
        assert text == TEXT[: TEXT.index("jump")]
        last = call.events[-2]["choices"][0] if stream else call.json["choices"][0]
        assert (last["finish_reason"], last["matched_stop"]) == ("stop", "jump[a-z]*")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"allowed_token_ids": [5], "regex": "a"}, "allowed_token_ids", "regex says already what may come"),
        ({"bad_words": ["fox"], "json_schema": {}}, "bad_words", "json_schema says already what may come"),
        ({"allowed_token_ids": THE, "bad_words": ["the"]}, "allowed_token_ids", "none could be left"),
    ],
)
async def test_what_could_leave_no_token_is_refused(
    served: Served, fields: dict[str, Any], param: str, words: str
) -> None:
    router, _ = served
    call = router.post("/v1/chat/completions", {"messages": MESSAGES, **fields})
    assert words in await refused(call, param)


async def test_a_promised_call_leaves_no_room_for_bad_words(tmp_path: Path) -> None:
    function = {"name": "see", "strict": True, "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    async with running_router(tmp_path, context_length=2048) as router:
        await router.add("both", ReplicaRole.AGGREGATED, automatic=True)
        body = {"messages": MESSAGES, "tools": tools, "bad_words": ["fox"]}
        call = router.post("/v1/chat/completions", {**body, "tool_choice": "required"})
        assert "tools says already what may come" in await refused(call, "bad_words")
        await answered(router.post("/v1/chat/completions", {**body, "tool_choice": "none"}))


async def test_of_a_long_prompt_the_first_tokens_stay_if_the_right_side_goes(served: Served) -> None:
    router, replica = served
    ids = list(range(5, 45))
    body = {"prompt": ids, "truncate_prompt_tokens": 7, "truncation_side": "right", "max_tokens": 4}
    await answered(router.post("/v1/completions", body))
    assert replica.opens[-1].job.prompt == ids[:7]
