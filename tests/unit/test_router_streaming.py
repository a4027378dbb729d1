"""The way of a healthy request: rooms on both halves, tokens in order, answers in each API's shape."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from router_harness import END_ID, TEXT, TEXT_IDS, TOKENIZER, RouterHarness, running_router, until

from protocol.membership import ReplicaRole
from protocol.rooms import OpenDecode, OpenGenerate, OpenPrefill
from protocol.sampling import FinishReason

CHAT = {"messages": [{"role": "user", "content": "a fox?"}], "max_tokens": 100}


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterHarness]:
    async with running_router(tmp_path) as harness:
        yield harness


async def test_both_halves_open_at_once_and_the_first_token_leaves_at_once(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.complete(seed=5, temperature=0.7)
    first, second = await prefill.opened(OpenPrefill), await decode.opened(OpenDecode)
    assert first.room == second.room
    assert first.room.epoch == 0
    assert first.job == second.job
    assert first.job.prompt == TOKENIZER.encode("a fox")
    assert (first.job.sampling.seed, first.job.sampling.temperature) == (5, 0.7)
    assert first.decode == router.members[decode].address
    assert second.prefill == router.members[prefill].address
    assert 0 < first.ttl_ms <= 600_000
    assert call.status is None
    prefill.send(first.room, 0, TEXT_IDS[0])
    await call.shows("the")
    assert call.status == 200
    decode.send(first.room, 1, *TEXT_IDS[1:8], finish=FinishReason.LENGTH)
    await call.done()
    assert call.streamed_text == TOKENIZER.decode(TEXT_IDS[:8])
    assert call.events[-1] == "[DONE]"
    assert call.events[-2]["choices"][0]["finish_reason"] == "length"
    assert call.headers["content-type"].startswith("text/event-stream")
    await router.idle()
    assert prefill.aborts == decode.aborts == []


async def test_decodes_tokens_before_prefills_first_are_put_in_order(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.complete()
    room = (await prefill.opened(OpenPrefill)).room
    await decode.opened(OpenDecode)
    decode.send(room, 1, *TEXT_IDS[1:5])
    decode.send(room, 5, *TEXT_IDS[5:8], finish=FinishReason.LENGTH)
    decode.send(room, 3, TEXT_IDS[3])  # a duplicate
    await router.get("/v1/models").done()
    assert call.status is None
    prefill.send(room, 0, TEXT_IDS[0])
    await call.done()
    assert call.streamed_text == TOKENIZER.decode(TEXT_IDS[:8])


async def test_one_token_opens_no_decode_half(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.complete(max_tokens=1)
    opened = await prefill.opened(OpenPrefill)
    assert opened.decode is None
    prefill.send(opened.room, 0, TEXT_IDS[0], finish=FinishReason.LENGTH)
    await call.done()
    assert call.streamed_text == "the"
    assert decode.opens == []


async def test_aggregated_replica_takes_the_whole(router: RouterHarness) -> None:
    replica = await router.add("both", ReplicaRole.AGGREGATED, automatic=True)
    call = await router.complete(max_tokens=100).done()
    assert isinstance(replica.opens[0], OpenGenerate)
    assert call.streamed_text == TEXT


@pytest.mark.parametrize("lost", [ReplicaRole.PREFILL, ReplicaRole.DECODE])
async def test_a_pool_that_was_lost_is_stood_in_for_by_the_other(router: RouterHarness, lost: ReplicaRole) -> None:
    pair = await router.pair(automatic=True)
    left, gone = pair if lost is ReplicaRole.DECODE else reversed(pair)
    router.remove(gone)
    call = await router.complete(max_tokens=100).done()
    assert isinstance(left.opens[0], OpenGenerate)
    assert call.streamed_text == TEXT


async def test_just_after_the_start_a_request_waits_for_the_pool_not_seen_yet(router: RouterHarness) -> None:
    prefill = await router.add("prefill", ReplicaRole.PREFILL)
    call = router.complete(max_tokens=2)
    await until(lambda: len(router.dispatcher.generations) == 1)
    decode = await router.add("decode", ReplicaRole.DECODE)
    room = (await prefill.opened(OpenPrefill)).room
    assert (await decode.opened(OpenDecode)).room == room
    call.leave()
    await call.done()


async def test_just_after_the_start_a_single_token_needs_no_other_pool(router: RouterHarness) -> None:
    prefill = await router.add("prefill", ReplicaRole.PREFILL)
    call = router.complete(max_tokens=1)
    room = (await prefill.opened(OpenPrefill)).room
    prefill.send(room, 0, TEXT_IDS[0], finish=FinishReason.LENGTH)
    assert (await call.done()).status == 200


async def test_a_pool_that_does_not_come_is_stood_in_for_after_a_wait(tmp_path: Path) -> None:
    async with running_router(tmp_path, failover_wait_s=0.05) as router:
        replica = await router.add("only", ReplicaRole.PREFILL, automatic=True)
        for _ in ("waits", "need not wait again"):
            assert (await router.complete(max_tokens=100).done()).streamed_text == TEXT
        assert all(isinstance(each, OpenGenerate) for each in replica.opens)


async def test_chat_whole(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    call = await router.post("/v1/chat/completions", {"model": "tiny", **CHAT}).done()
    assert call.status == 200
    answer = call.json
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt = prefill.opens[0].job.prompt
    assert TOKENIZER.decode(prompt, skip_special_tokens=False) == (
        "<s><|im_start|>user\na fox?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = len(TEXT_IDS) + 1
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": tokens,
        "total_tokens": len(prompt) + tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_chat_stream_equals_whole(router: RouterHarness) -> None:
    await router.pair(automatic=True)
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    events = (await router.post("/v1/chat/completions", body).done()).events
    whole = (await router.post("/v1/chat/completions", CHAT).done()).json
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["object"] == "chat.completion.chunk" for event in events[:-1])
    assert len({event["id"] for event in events[:-1]}) == 1
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-2])
    assert text == whole["choices"][0]["message"]["content"]
    assert [event["choices"][0]["finish_reason"] for event in events[:-2]][-1] == "stop"
    assert all(event["usage"] is None for event in events[:-2])
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == whole["usage"]
    assert events[-1] == "[DONE]"


async def test_choices_are_rooms_of_their_own(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    whole = (await router.post("/v1/chat/completions", {**CHAT, "n": 3, "seed": 9}).done()).json
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in whole["choices"]} == {TEXT}
    assert [opened.job.choice for opened in prefill.opens] == [0, 1, 2]
    assert {opened.job.sampling.seed for opened in prefill.opens} == {9}
    assert len({opened.room.request_id for opened in prefill.opens}) == 3
    assert whole["usage"]["prompt_tokens"] == len(prefill.opens[0].job.prompt)
    assert whole["usage"]["completion_tokens"] == 3 * (len(TEXT_IDS) + 1)
    await router.idle()


async def test_choices_stream_interleaved(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.complete(n=2, max_tokens=2)
    rooms = [(await prefill.opened(OpenPrefill)).room for _ in range(2)]
    prefill.send(rooms[1], 0, TEXT_IDS[0], choice=1)
    await call.shows("the")
    prefill.send(rooms[0], 0, TEXT_IDS[1])
    decode.send(rooms[0], 1, TEXT_IDS[2], finish=FinishReason.LENGTH)
    decode.send(rooms[1], 1, TEXT_IDS[1], finish=FinishReason.LENGTH, choice=1)
    await call.done()
    texts = {0: "", 1: ""}
    for event in call.events[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == {0: TOKENIZER.decode(TEXT_IDS[1:3]), 1: TOKENIZER.decode(TEXT_IDS[0:2])}


async def test_several_prompts_as_text_and_as_ids(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    for prompt in (["a fox", "the dog"], [TOKENIZER.encode("a fox"), TOKENIZER.encode("the dog")]):
        whole = (await router.complete(prompt=prompt, stream=False, n=2).done()).json
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
        prompts = [opened.job.prompt for opened in prefill.opens[-4:]]
        assert [TOKENIZER.decode(ids) for ids in prompts] == ["a fox", "a fox", "the dog", "the dog"]
        assert whole["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[2])
        assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}


async def test_stop_string_is_cut_out(router: RouterHarness) -> None:
    _, decode = await router.pair()
    call = router.complete(stop=["brown fox"], max_tokens=40)
    room = (await decode.opened(OpenDecode)).room
    ids = TOKENIZER.encode("the quick brown fox", add_special_tokens=False)
    prefill = next(replica for replica in router.members if replica is not decode)
    prefill.send(room, 0, ids[0])
    decode.send(room, 1, *ids[1:], finish=FinishReason.STOP_STRING, matched="brown fox")
    await call.done()
    assert call.streamed_text == "the quick "
    last = call.events[-2]["choices"][0]
    assert (last["finish_reason"], last["matched_stop"]) == ("stop", "brown fox")


async def test_a_stop_token_that_is_text_is_not_shown(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.complete(stop_token_ids=[TEXT_IDS[1]], stop=["the dog"])
    room = (await prefill.opened(OpenPrefill)).room
    prefill.send(room, 0, TEXT_IDS[0])
    decode.send(room, 1, TEXT_IDS[1], finish=FinishReason.STOP_TOKEN, matched=TEXT_IDS[1])
    await call.done()
    assert call.streamed_text == "the"  # held back for the stop string, then let go
    assert call.events[-2]["choices"][0]["matched_stop"] == TEXT_IDS[1]


async def test_chat_logprobs(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    body = {**CHAT, "logprobs": True, "top_logprobs": 2}
    whole = (await router.post("/v1/chat/completions", body).done()).json
    assert prefill.opens[0].job.sampling.logprobs == 2
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == len(TEXT_IDS)  # the end token is no content
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == TEXT
    assert {entry["logprob"] for entry in content} == {-0.5}
    events = (await router.post("/v1/chat/completions", {**body, "stream": True}).done()).events
    streamed = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert [token for entry in streamed if entry for token in entry["content"]] == content


async def test_completion_logprobs(router: RouterHarness) -> None:
    await router.pair(automatic=True)
    whole = (await router.complete(stream=False, logprobs=1, max_tokens=4).done()).json
    logprobs = whole["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == whole["choices"][0]["text"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["text_offset"][0] == 0
    call = await router.complete(logprobs=1, max_tokens=4).done()
    streamed = [event["choices"][0]["logprobs"] for event in call.events[:-1]]
    assert [offset for entry in streamed for offset in entry["text_offset"]] == logprobs["text_offset"]


async def test_generate_whole(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    body = {"text": "a fox", "sampling_params": {"max_new_tokens": 100, "temperature": 0}, "rid": "mine"}
    answer = (await router.post("/generate", body).done()).json
    assert answer["text"] == TEXT
    assert answer["output_ids"] == [*TEXT_IDS, END_ID]
    meta = answer["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "stop", "matched": END_ID}
    assert meta["prompt_tokens"] == len(prefill.opens[0].job.prompt)
    assert meta["completion_tokens"] == len(TEXT_IDS) + 1
    assert meta["cached_tokens"] == 3


async def test_generate_streams_the_text_so_far(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.post("/generate", {"input_ids": [5, 6, 7], "max_new_tokens": 3, "temperature": 0, "stream": True})
    opened = await prefill.opened(OpenPrefill)
    assert opened.job.prompt == [5, 6, 7]
    assert opened.job.sampling.temperature == 0
    prefill.send(opened.room, 0, TEXT_IDS[0])
    await call.shows("the")
    decode.send(opened.room, 1, *TEXT_IDS[1:3], finish=FinishReason.LENGTH)
    await call.done()
    first, *_, last, done = call.events
    assert done == "[DONE]"
    assert (first["text"], first["meta_info"]["finish_reason"]) == ("the", None)
    assert last["text"] == TOKENIZER.decode(TEXT_IDS[:3])
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 3}


async def test_generate_batch(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    sampling = [{"max_new_tokens": 1}, {"max_new_tokens": 2, "temperature": 0.5}]
    body = {"text": ["a fox", "the dog"], "sampling_params": sampling, "return_logprob": True}
    answers = (await router.post("/generate", body).done()).json
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [1, 2]
    assert answers[1]["meta_info"]["output_token_logprobs"] == [[-0.5, id_, None] for id_ in TEXT_IDS[:2]]
    assert [opened.job.sampling.temperature for opened in prefill.opens] == [1.0, 0.5]
    events = (await router.post("/generate", {**body, "stream": True}).done()).events
    assert {event["index"] for event in events[:-1]} == {0, 1}


@pytest.mark.parametrize(
    ("n", "rid", "ids"),
    [(1, "mine", ["mine_0", "mine_1"]), (1, ["a", "b"], ["a", "b"]), (2, ["a", "b"], ["a_0", "a_1", "b_0", "b_1"])],
)
async def test_generate_names_each_output(router: RouterHarness, n: int, rid: str | list[str], ids: list[str]) -> None:
    await router.pair(automatic=True)
    body = {"text": ["a fox", "the dog"], "sampling_params": {"max_new_tokens": 1.0, "n": n}, "rid": rid}
    answers = (await router.post("/generate", body).done()).json
    assert [answer["meta_info"]["id"] for answer in answers] == ids


async def test_the_last_event_of_a_generate_stream_is_the_whole(router: RouterHarness) -> None:
    replica = await router.add("both", ReplicaRole.AGGREGATED)
    body = {"text": "a fox", "max_new_tokens": len(TEXT_IDS), "return_logprob": True, "return_text_in_logprobs": True}
    call = router.post("/generate", {**body, "stream": True})
    room = (await replica.opened(OpenGenerate)).room
    for position, token in enumerate(TEXT_IDS):
        finish = FinishReason.LENGTH if position == len(TEXT_IDS) - 1 else None
        replica.send(room, position, token, finish=finish, logprob=-0.5)
        await call.shows(f'"completion_tokens":{position + 1},')
    await call.done()
    replica.automatic = True
    whole = (await router.post("/generate", body).done()).json
    assert whole["text"] == TEXT
    assert whole["output_ids"] == TEXT_IDS
    last = call.events[-2]
    for answer in (whole, last):
        del answer["meta_info"]["id"], answer["meta_info"]["e2e_latency"], answer["meta_info"]["cached_tokens"]
    assert last == whole


async def test_affinity_keeps_a_prefix_where_it_is(router: RouterHarness) -> None:
    for _ in range(2):
        await router.pair(automatic=True)
    prompt = "the quick brown fox jumps over the lazy dog " * 4
    prefills = [replica for replica in router.members if replica.role is ReplicaRole.PREFILL]
    for _ in range(3):
        await router.complete(prompt=prompt, max_tokens=2).done()
    assert sorted(len(replica.opens) for replica in prefills) == [0, 3]
    for number in range(4):
        await router.complete(prompt=f"{number} is another prompt altogether, and a longer one", max_tokens=2).done()
    assert min(len(replica.opens) for replica in prefills) >= 2
