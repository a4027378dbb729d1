"""Log-probabilities of prompts in answers: echo and prompt_logprobs of completions, and /generate's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from router_harness import TEXT, TEXT_IDS, TOKENIZER, FakeReplica, RouterHarness, running_router, scores_of, until

from protocol.membership import ReplicaRole
from protocol.rooms import Job, OpenGenerate, PromptScores
from protocol.sampling import FinishReason, SamplingParams
from protocol.scoring import Scoring
from router.api.score_limit import MAX_NUMBERS, check_scores
from router.errors import ApiError

PROMPT = "the lazy dog"
IDS = TOKENIZER.encode(PROMPT)
NAMES = [TOKENIZER.token_text(token) for token in IDS]
FIRST = TOKENIZER.token_text(TEXT_IDS[0])


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterHarness]:
    async with running_router(tmp_path) as harness:
        yield harness


async def complete(router: RouterHarness, **fields: Any) -> Any:
    call = await router.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, **fields}).done()
    assert call.status == 200, call.body
    return call.json


async def generate(router: RouterHarness, **fields: Any) -> Any:
    call = await router.post("/generate", {"input_ids": IDS, "max_new_tokens": 2, **fields}).done()
    assert call.status == 200, call.body
    return call.json


async def test_echo_scores_the_prompt_and_nothing_need_follow(router: RouterHarness) -> None:
    prefill, decode = await router.pair(automatic=True)
    whole = await complete(router, echo=True, logprobs=1, max_tokens=0)
    (choice,) = whole["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == NAMES
    assert logprobs["token_logprobs"] == [None, *(-float(position) for position in range(1, len(IDS)))]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {FIRST: -1.0, NAMES[1]: -1.0}
    for name, offset in list(zip(NAMES, logprobs["text_offset"], strict=True))[1:]:  # the first is hidden: <s>
        assert PROMPT[offset : offset + len(name)] == name
    assert whole["usage"]["completion_tokens"] == 0
    assert prefill.opens[0].job.scoring == Scoring(1, 1)
    assert not decode.opens


async def test_echo_goes_before_what_is_generated_streamed_or_not(router: RouterHarness) -> None:
    await router.pair(automatic=True)
    for prompt, shown in ((PROMPT, [PROMPT]), ([PROMPT, "a fox"], [PROMPT, "a fox"]), ([IDS, IDS], [PROMPT, PROMPT])):
        whole = await complete(router, prompt=prompt, echo=True, logprobs=2)
        plain = await complete(router, prompt=prompt)
        for choice, other, text in zip(whole["choices"], plain["choices"], shown, strict=True):
            assert choice["text"] == text + other["text"]
            assert len(choice["logprobs"]["tokens"]) == len(TOKENIZER.encode(text)) + 3
        body = {"prompt": prompt, "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 2, "stream": True}
        events = (await router.post("/v1/completions", body).done()).events[:-1]
        for choice in whole["choices"]:
            mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
            assert "".join(each["text"] for each in mine) == choice["text"]
            for name, values in choice["logprobs"].items():
                assert [value for each in mine for value in each["logprobs"][name]] == values


async def test_echo_without_logprobs_scores_nothing(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    assert (await complete(router, echo=True))["choices"][0]["text"].startswith(PROMPT)
    assert prefill.opens[0].job.scoring is None
    call = await router.complete(prompt=PROMPT, echo=True).done()
    assert call.streamed_text == PROMPT + TEXT[: len(call.streamed_text) - len(PROMPT)]


async def test_prompt_logprobs_tell_ranks(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    (choice,) = (await complete(router, prompt_logprobs=2))["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert len(others) == len(IDS) - 1
    for position, entry in enumerate(others, start=1):
        own = entry[str(IDS[position])]
        assert own == {"logprob": -float(position), "rank": position + 1, "decoded_token": NAMES[position]} or (
            IDS[position] in TEXT_IDS[:2]
        )
        assert entry[str(TEXT_IDS[1])]["rank"] == 2
    assert prefill.opens[0].job.scoring == Scoring(1, 2, (), True)
    assert choice["logprobs"] is None


async def test_only_the_first_choice_scores_and_all_tell(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    whole = await complete(router, echo=True, logprobs=0, n=3)
    assert [each.job.scoring for each in prefill.opens] == [Scoring(1, 0), None, None]
    described = [choice["logprobs"]["token_logprobs"][: len(IDS)] for choice in whole["choices"]]
    assert described[0] == described[1] == described[2]
    assert len(described[0]) == len(IDS)


async def test_choices_ahead_of_their_prompts_scores_wait_for_them(router: RouterHarness) -> None:
    replica = await router.add("one", ReplicaRole.AGGREGATED)
    body = {"prompt": PROMPT, "max_tokens": 1, "echo": True, "logprobs": 0, "n": 2, "stream": True}
    call = router.post("/v1/completions", body)
    first, second = [await replica.opened(OpenGenerate) for _ in range(2)]
    replica.send(second.room, 0, TEXT_IDS[0], finish=FinishReason.LENGTH, logprob=-1.0)
    await until(lambda: second.room.request_id not in router.dispatcher.generations)
    assert b"data" not in call.body
    _score(replica, first)
    replica.send(first.room, 0, TEXT_IDS[0], finish=FinishReason.LENGTH, logprob=-1.0)
    events = (await call.done()).events[:-1]
    assert {event["choices"][0]["index"] for event in events} == {0, 1}
    for event in events:
        assert len(event["choices"][0]["logprobs"]["tokens"]) == len(IDS) + 1


def _score(replica: FakeReplica, opened: OpenGenerate) -> None:
    job: Job = opened.job
    assert job.scoring is not None
    replica.link.send(PromptScores(opened.room, scores_of(job.prompt, job.scoring)))


async def test_the_best_choices_are_those_with_the_highest_sum(router: RouterHarness) -> None:
    replica = await router.add("one", ReplicaRole.AGGREGATED)
    call = router.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "n": 2, "best_of": 4})
    opens = [await replica.opened(OpenGenerate) for _ in range(4)]
    assert [each.job.choice for each in opens] == [0, 1, 2, 3]
    for opened, logprob, token in zip(opens, (-3.0, -0.5, -2.0, -1.0), TEXT_IDS, strict=False):
        replica.send(opened.room, 0, token, TEXT_IDS[0], finish=FinishReason.LENGTH, logprob=logprob)
    answer = (await call.done()).json
    texts = [TOKENIZER.decode([TEXT_IDS[place], TEXT_IDS[0]]) for place in (1, 3)]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 8


async def test_token_ids_come_with_completions(router: RouterHarness) -> None:
    await router.pair(automatic=True)
    (choice,) = (await complete(router, return_token_ids=True))["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (IDS, TEXT_IDS[:3])
    events = (await router.complete(prompt=PROMPT, max_tokens=3, return_token_ids=True).done()).events[:-1]
    streamed = [event["choices"][0] for event in events]
    assert [token for each in streamed for token in each["token_ids"]] == TEXT_IDS[:3]
    assert [each.get("prompt_token_ids") for each in streamed] == [IDS, *[None] * (len(streamed) - 1)]


async def test_generate_describes_the_prompt_from_where_it_is_asked(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    fields = {"return_logprob": True, "top_logprobs_num": 1, "token_ids_logprob": [7, 9], "logprob_start_len": 2}
    meta = (await generate(router, **fields, return_text_in_logprobs=True))["meta_info"]
    assert prefill.opens[0].job.scoring == Scoring(3, 1, (7, 9))
    positions = range(3, len(IDS))
    own = [[None, IDS[2], NAMES[2]], *([-float(each), IDS[each], NAMES[each]] for each in positions)]
    assert meta["input_token_logprobs"] == own
    assert meta["input_top_logprobs"] == [None, *([[-float(each), TEXT_IDS[0], FIRST]] for each in positions)]
    named = [TOKENIZER.token_text(token) for token in (7, 9)]
    assert meta["input_token_ids_logprobs"] == [
        None,
        *([[-each - 0.007, 7, named[0]], [-each - 0.009, 9, named[1]]] for each in positions),
    ]
    assert [each[0] for each in meta["output_token_logprobs"]] == [-0.5, -0.5]
    assert len(meta["output_token_ids_logprobs"]) == len(meta["output_top_logprobs"]) == 2


async def test_generate_describes_the_output_alone_by_default(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    meta = (await generate(router, return_logprob=True))["meta_info"]
    assert prefill.opens[0].job.scoring is None
    assert meta["input_token_logprobs"] == [[None, IDS[-1], None]]
    assert "input_top_logprobs" not in meta
    assert meta["weight_version"] == "default"
    assert "output_token_logprobs" not in (await generate(router))["meta_info"]


async def test_generate_takes_a_value_for_each_prompt(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    fields = {
        "input_ids": [IDS, IDS[:3]],
        "return_logprob": [True, False],
        "logprob_start_len": [0, 1],
        "top_logprobs_num": [2, 0],
        "token_ids_logprob": [[], [5]],
    }
    first, second = await generate(router, **fields)
    assert [each.job.scoring for each in prefill.opens] == [Scoring(1, 2), None]
    assert len(first["meta_info"]["input_token_logprobs"]) == len(IDS)
    assert not any("logprob" in name for name in second["meta_info"])


async def test_long_scored_prompts_are_described_beside_the_event_loop(tmp_path: Path) -> None:
    async with running_router(tmp_path, context_length=4096) as router:
        await router.pair(automatic=True)
        prompts = [list(range(5, 105)) * 3, list(range(5, 305))]
        fields = {"max_tokens": 0, "echo": True, "logprobs": 1, "prompt_logprobs": 0}
        together = (await complete(router, prompt=prompts, **fields))["choices"]
        for choice, prompt in zip(together, prompts, strict=True):
            (alone,) = (await complete(router, prompt=prompt, **fields))["choices"]
            assert choice | {"index": 0} == alone


async def test_what_is_scored_is_charged_whole(router: RouterHarness) -> None:
    replica = await router.add("one", ReplicaRole.AGGREGATED)
    prompt = list(range(5, 105))
    for start, charged in ((-1, 100), (-1, 4), (0, 100), (70, 36)):
        call = router.post("/generate", {"input_ids": prompt, "return_logprob": True, "logprob_start_len": start})
        opened = await replica.opened(OpenGenerate)
        assert router.view(replica).prefill_tokens == charged
        if opened.job.scoring is not None:
            _score(replica, opened)
        replica.send(opened.room, 0, TEXT_IDS[0], finish=FinishReason.LENGTH, logprob=-1.0)
        await call.done()


async def test_priorities_reach_the_replicas(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    await generate(router, priority=3)
    await complete(router, priority=3)  # vLLM counts the other way round
    assert [opened.job.priority for opened in prefill.opens] == [3, -3]


async def test_generate_can_score_and_make_nothing(router: RouterHarness) -> None:
    _, decode = await router.pair(automatic=True)
    answer = await generate(router, max_new_tokens=0, return_logprob=True, logprob_start_len=0)
    assert (answer["text"], answer["output_ids"]) == ("", [])
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 0}
    assert (len(meta["input_token_logprobs"]), meta["output_token_logprobs"]) == (len(IDS), [])
    assert not decode.opens


async def test_a_stream_repeats_the_prompts_logprobs(router: RouterHarness) -> None:
    await router.pair(automatic=True)
    fields = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
    whole = await generate(router, **fields)
    call = await router.post("/generate", {"input_ids": IDS, "max_new_tokens": 2, "stream": True, **fields}).done()
    *_, last, done = call.events
    assert done == "[DONE]"
    for name, value in whole["meta_info"].items():
        if name not in ("e2e_latency", "id"):
            assert last["meta_info"][name] == value
    assert call.events[0]["meta_info"]["input_token_logprobs"] == whole["meta_info"]["input_token_logprobs"]


LONG = [5] * 52_000


@pytest.mark.parametrize(
    ("path", "fields", "param", "value"),
    [
        ("/v1/completions", {"prompt": LONG, "prompt_logprobs": 20}, "prompt_logprobs", "20"),
        ("/v1/completions", {"prompt": LONG, "echo": True, "logprobs": 20}, "logprobs", "20"),
        ("/v1/completions", {"prompt": LONG, "prompt_logprobs": 0, "logprobs": 20}, "logprobs", "20"),
        ("/v1/completions", {"prompt": [LONG[:26_000]] * 2, "prompt_logprobs": 20}, "prompt_logprobs", "20"),
        ("/generate", {"input_ids": LONG, "top_logprobs_num": 20}, "top_logprobs_num", "20"),
        ("/generate", {"input_ids": LONG, "token_ids_logprob": [5] * 40}, "token_ids_logprob", "[5, 5"),
    ],
)
async def test_too_many_scores_are_refused(
    tmp_path: Path, path: str, fields: dict[str, Any], param: str, value: str
) -> None:
    native = {"return_logprob": True, "logprob_start_len": 0} if path == "/generate" else {}
    async with running_router(tmp_path, context_length=60_000) as router:
        call = await router.post(path, {**native, **fields}).done()
    assert call.status == 400, call.body
    error = call.json["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: {value}")
    assert f"limit of {MAX_NUMBERS} a request; ask for less, or send fewer or shorter prompts" in error["message"]


def test_scores_are_counted_over_all_prompts() -> None:
    sampling = SamplingParams(max_tokens=1)
    half = Job(prompt=[5] * (2**20 // 16 + 1), sampling=sampling, scoring=Scoring(1, 7, (5,)))
    check_scores([half, half, Job(prompt=LONG, sampling=sampling)], param="p", value=7)
    with pytest.raises(ApiError, match=f"p: 7 asks for {2**21 + 1} numbers"):
        check_scores([half, half, Job(prompt=[5, 5], sampling=sampling, scoring=Scoring(1))], param="p", value=7)
