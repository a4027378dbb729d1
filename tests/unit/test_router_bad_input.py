"""Whatever a client sends, it is told what is wrong with it, and the next request works."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from chat_templates import HERMES
from router_harness import TEXT, TOKENIZER, Call, RouterHarness, running_router
from tiny_tokenizers import CHAT_TEMPLATE

from protocol.membership import ReplicaRole
from router.api.fields import shown

USER = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterHarness]:
    async with running_router(tmp_path, max_body_bytes=20_000, max_sequences_per_request=8) as harness:
        await harness.add("both", ReplicaRole.AGGREGATED, automatic=True)
        yield harness


async def refused(router: RouterHarness, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error object of a refusal, after which the router still serves and holds nothing."""
    call = await router.post(path, body).done()
    assert call.status == status, call.body
    assert call.headers["content-type"] == "application/json"
    error = call.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    await router.idle()
    assert (await router.complete(stream=False, max_tokens=100).done()).json["choices"][0]["text"] == TEXT
    return error


FIELDS = [
    # every API's sampling fields, by their common names
    ({"temperature": -1}, "temperature", "-1"),
    ({"temperature": 1e9}, "temperature", "less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", '"hot"'),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.5}, "top_p", "1.5"),
    ({"top_k": -5}, "top_k", "-5"),
    ({"top_k": 1.5}, "top_k", "1.5"),
    ({"min_p": -0.1}, "min_p", "-0.1"),
    ({"repetition_penalty": 1e-9}, "repetition_penalty", "greater than or equal to 0.01"),
    ({"presence_penalty": 3}, "presence_penalty", "3"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-3"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias", "not a token id"),
    ({"logit_bias": {"\u0665": 1}}, "logit_bias", "not a token id"),
    ({"logit_bias": {"5": 1000}}, "logit_bias", "1000"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
    ({"allowed_token_ids": []}, "allowed_token_ids", "at least 1 item"),
    ({"allowed_token_ids": [5, 10**6]}, "allowed_token_ids", "1000000 is not a token id"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]", "-1"),
    ({"bad_words": "fox"}, "bad_words", "valid list"),
    ({"bad_words": [""]}, "bad_words[0]", "at least 1 character"),
    ({"bad_words": ["fox", "  "]}, "bad_words[1]", "has no token of its own"),
    ({"bad_words": ["a"] * 129}, "bad_words", "at most 128"),
    ({"stop_regex": ""}, "stop_regex[0]", "at least 1 character"),
    ({"stop_regex": ["a", "("]}, "stop_regex", "is no regular expression"),
    ({"stop_regex": "a*"}, "stop_regex", "matches the empty text"),
    ({"stop_regex": "(?=a)b"}, "stop_regex", "looks ahead"),
    ({"stop_regex": "a" * 1025}, "stop_regex[0]", "at most 1024"),
    ({"stop_regex": "a{400}", "stop": ["b" * 200]}, "stop_regex", "more than 256 parts"),
    ({"stop": ""}, "stop[0]", "at least 1 character"),
    ({"stop": ["a"] * 40}, "stop", "32"),
    ({"stop": 5}, "stop", "5"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "-1"),
    ({"stop_token_ids": [99999]}, "stop_token_ids", "99999"),
    ({"ignore_eos": "yes"}, "ignore_eos", '"yes"'),
    ({"n": 0}, "n", "0"),
    ({"n": 9}, "n", "limit of 8"),
    ({"n": True}, "n", "true"),
    ({"regex": ""}, "regex", "it is empty"),
    ({"regex": "a+", "ebnf": 'root ::= "a"'}, "ebnf", "regex constrains the output already"),
    ({"guided_choice": []}, "guided_choice", "at least 1"),
    ({"guided_json": "{"}, "guided_json", "not valid JSON"),
    ({"json_schema": 5}, "json_schema", "no JSON schema"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "not a parameter"),
    ({"temprature": 1}, "temprature", "did you mean temperature?"),
    ({"stream": "yes"}, "stream", '"yes"'),
    ({"xyzzy": 1}, "xyzzy", "leave it out"),
]
OPENAI_FIELDS = [
    ({"max_tokens": -3}, "max_tokens", "-3"),
    ({"max_tokens": "many"}, "max_tokens", '"many"'),
    ({"max_tokens": 2.5}, "max_tokens", "2.5"),
    ({"max_tokens": 10**30}, "max_tokens", "10000"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "9 is more than max_tokens"),
    ({"seed": 1.5}, "seed", "1.5"),
    ({"seed": 2**64}, "seed", "18446744073709551616"),
    ({"model": 5}, "model", "5"),
    ({"stream_options": {"include": 1}}, "stream_options.include", "not a parameter"),
    ({"metadata": {"a": 1}}, "metadata.a", "1"),
]
CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
NAMED_G = {"type": "function", "function": {"name": "g"}}
CHAT_FIELDS = [
    ({"max_tokens": 0}, "max_tokens", "0"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "hi"}, "messages", '"hi"'),
    ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role", '"king"'),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "5"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]", "input_audio"),
    ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0]", "reads text only"),
    ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0]", "type"),
    ({"messages": [{"role": "function", "name": "f", "content": "5"}]}, "messages[0].role", '"function"'),
    ({"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}, "messages[0]", "role tool, not user"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages[0]", "role assistant"),
    ({"messages": [{"role": "assistant", "function_call": {}}]}, "messages[0]", "function_call"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        "messages[0].tool_calls[0].function",
        "missing",
    ),
    ({"functions": [{"name": "f"}]}, "functions", "use tools"),
    ({"function_call": "auto"}, "function_call", "use tool_choice"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
    ({"tools": [{"type": "custom"}]}, "tools[0]", '"custom"'),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", '"a b"'),
    ({"tools": [TOOL, TOOL]}, "tools", "f is there more than once"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        "tools[0].function.parameters",
        '"array"',
    ),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [TOOL], "tool_choice": "f"}, "tool_choice", '"f" is no choice'),
    ({"tools": [TOOL], "tool_choice": NAMED_G}, "tool_choice", '"g" is none of the tools, which are f'),
    ({"store": True}, "store", "not supported"),
    ({"service_tier": "flex"}, "service_tier", "not supported"),
    ({"priority": 2**31}, "priority", "2147483648"),
    ({"prediction": {"type": "content"}}, "prediction", "not supported"),
    ({"echo": True}, "echo", "set continue_final_message"),
    ({"continue_final_message": True}, "continue_final_message", "no text of the assistant"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "add_generation_prompt",
    ),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "router.allow_request_chat_template"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "knows no effort"),
    ({"reasoning_effort": "lots"}, "reasoning_effort", '"lots"'),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema and structural_tag"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "no schema"),
    ({"top_logprobs": 3}, "top_logprobs", "set logprobs to true"),
    ({"logprobs": True, "top_logprobs": 50}, "top_logprobs", "50"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "-1"),
    ({"max_completion_tokens": 2, "min_tokens": 5}, "min_tokens", "5 is more than max_completion_tokens, which is 2"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages is set by this API itself"),
]
COMPLETION_FIELDS = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "non-empty list"),
    ({"prompt": [""]}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt[0]", "empty"),
    ({"prompt": 5}, "prompt", "5"),
    ({"prompt": {"a": 1}}, "prompt", "no prompt"),
    ({"prompt": ["a", 5]}, "prompt", "no prompt"),
    ({"prompt": [True]}, "prompt", "no prompt"),
    ({"prompt": [-1]}, "prompt", "-1 at position 0"),
    ({"prompt": [5, 10**9]}, "prompt", "1000000000 at position 1"),
    ({"prompt": ["a"] * 9}, "prompt", "limit of 8"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"echo": 1}, "echo", "1"),
    ({"logprobs": -1}, "logprobs", "-1"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "21"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "leave prompt_logprobs or stream out"),
    ({"best_of": 1, "n": 2}, "best_of", "1 choices are not enough for n, which is 2"),
    ({"best_of": 3, "stream": True}, "best_of", "leave best_of or stream out"),
    ({"best_of": 9}, "n", "limit of 8"),
    ({"max_tokens": 0, "min_tokens": 1}, "min_tokens", "more than max_tokens, which is 0"),
]
NATIVE_FIELDS = [
    ({"text": None}, "text", "either text or input_ids"),
    ({"input_ids": [5]}, "text", "not both"),
    ({"text": ""}, "text", "empty"),
    ({"text": [5]}, "text", "input_ids"),
    ({"text": None, "input_ids": ["a"]}, "input_ids", "no token id"),
    ({"text": None, "input_ids": []}, "input_ids", "non-empty"),
    ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature", "-1"),
    ({"sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens", "-1"),
    ({"max_new_tokens": 0, "min_new_tokens": 1}, "min_new_tokens", "more than max_new_tokens, which is 0"),
    ({"sampling_params": {"max_tokens": 5}}, "sampling_params.max_tokens", "did you mean"),
    ({"sampling_params": {"json_schema": []}}, "json_schema", "no JSON schema"),
    ({"sampling_params": [{}, {}]}, "sampling_params", "2 values for 1 prompts"),
    ({"sampling_params": 5}, "sampling_params", "5"),
    ({"top_p": 3, "sampling_params": {"temperature": 0}}, "top_p", "3"),
    ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens", "9 is more than max_new_tokens, which is 3"),
    ({"min_new_tokens": 200}, "min_new_tokens", "200 is more than max_new_tokens, which is 128 here"),
    ({"logprob_start_len": -2}, "logprob_start_len", "-2"),
    ({"logprob_start_len": 50}, "logprob_start_len", "50 is not within the prompt"),
    ({"logprob_start_len": [0, 0]}, "logprob_start_len", "2 values for 1 prompts"),
    ({"return_logprob": [True, 1]}, "return_logprob[1]", "1"),
    ({"top_logprobs_num": 21}, "top_logprobs_num", "21"),
    ({"token_ids_logprob": [10**9]}, "token_ids_logprob", "1000000000 at position 0"),
    ({"token_ids_logprob": [[1], [2]]}, "token_ids_logprob", "2 values for 1 prompts"),
    ({"lora_path": "x"}, "lora_path", "not supported"),
    ({"routed_dp_rank": 1}, "routed_dp_rank", "not supported"),
    ({"rid": ""}, "rid", "at least 1 character"),
    ({"rid": 5}, "rid", "valid string"),
    ({"rid": ["a", 5]}, "rid[1]", "valid string"),
    ({"rid": ["a", "b"]}, "rid", "2 ids for 1 prompts"),
    ({"text": ["hi", "ho"], "rid": ["a", "a"]}, "rid", "names two prompts alike"),
]


async def check(router: RouterHarness, path: str, body: dict[str, Any], param: str, words: str) -> None:
    error = await refused(router, path, body)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(("fields", "param", "words"), [*FIELDS, *OPENAI_FIELDS, *CHAT_FIELDS])
async def test_chat_fields(router: RouterHarness, fields: dict[str, Any], param: str, words: str) -> None:
    await check(router, CHAT, {"messages": USER, **fields}, param, words)


@pytest.mark.parametrize(("fields", "param", "words"), [*FIELDS, *OPENAI_FIELDS, *COMPLETION_FIELDS])
async def test_completion_fields(router: RouterHarness, fields: dict[str, Any], param: str, words: str) -> None:
    await check(router, COMPLETIONS, {"prompt": "hi", **fields}, param, words)


@pytest.mark.parametrize(("fields", "param", "words"), [*FIELDS, *NATIVE_FIELDS])
async def test_native_fields(router: RouterHarness, fields: dict[str, Any], param: str, words: str) -> None:
    await check(router, GENERATE, {"text": "hi", **fields}, param, words)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b"[" * 10_000, "not valid JSON"),
        (b"[]", "send a JSON object"),
        (b'"hi"', "send a JSON object"),
        (b"null", "send a JSON object"),
    ],
)
async def test_bodies_that_are_no_request(router: RouterHarness, path: str, body: bytes, words: str) -> None:
    assert words in (await refused(router, path, body))["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize"])
async def test_unknown_model(router: RouterHarness, path: str) -> None:
    body = {"model": "gpt-17", "messages": USER} if path == CHAT else {"model": "gpt-17", "prompt": "hi"}
    error = await refused(router, path, body, 404)
    assert error["code"] == "model_not_found"
    assert '"gpt-17"' in error["message"]
    assert "'tiny'" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (COMPLETIONS, {"prompt": [5] * 256}, ("256 tokens", "has 256 tokens")),
        (COMPLETIONS, {"prompt": [5] * 200, "max_tokens": 57}, ("256", "200 tokens", "57 more", "lower max_tokens")),
        (COMPLETIONS, {"prompt": "x " * 300}, ("256", "tokens")),
        (COMPLETIONS, {"prompt": "x" * 15_000}, ("256", "at least")),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 300}]}, ("256", "tokens")),
        (CHAT, {"messages": USER, "max_completion_tokens": 250}, ("256", "250 more", "lower max_completion_tokens")),
        (GENERATE, {"input_ids": [5] * 300}, ("256", "300")),
        (GENERATE, {"text": "hi", "max_new_tokens": 300}, ("256", "300 more", "lower max_new_tokens")),
    ],
)
async def test_too_long_names_both_lengths(
    router: RouterHarness, path: str, body: dict[str, Any], words: tuple[str, ...]
) -> None:
    error = await refused(router, path, body)
    assert error["code"] == "context_length_exceeded"
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (COMPLETIONS, {"prompt": "hi", "model": "x" * 10_000}, 404),
        (COMPLETIONS, {"prompt": "hi", "x" * 10_000: 1}, 400),
        (COMPLETIONS, {"prompt": "hi", "temperature": "x" * 10_000}, 400),
        (GENERATE, {"text": [{"k": "x" * 10_000}]}, 400),
        (GENERATE, {"input_ids": ["x" * 10_000]}, 400),
        (GENERATE, {"text": "hi", "sampling_params": {"x" * 10_000: 1}}, 400),
    ],
)
async def test_an_answer_does_not_repeat_all_that_was_sent(
    router: RouterHarness, path: str, body: dict[str, Any], status: int
) -> None:
    error = await refused(router, path, body, status)
    assert len(str(error)) < 1000


async def test_the_longest_prompt_that_fits_is_served(router: RouterHarness) -> None:
    call = await router.complete(prompt=[5] * 255, max_tokens=1, stream=False).done()
    assert call.status == 200


async def test_body_over_the_limit(router: RouterHarness) -> None:
    error = await refused(router, COMPLETIONS, {"prompt": "x" * 30_000}, 413)
    assert "20000" in error["message"]
    call = Call(router.app, "POST", COMPLETIONS, b"{}", {"Content-Length": "99999999"})
    assert (await call.done()).status == 413


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf"])
async def test_request_timeout_header(router: RouterHarness, value: str) -> None:
    call = await router.post(COMPLETIONS, {"prompt": "hi"}, headers={"X-Request-Timeout": value}).done()
    assert call.status == 400
    assert call.json["error"]["param"] == "X-Request-Timeout"


async def test_fields_that_ask_for_nothing_are_accepted(router: RouterHarness) -> None:
    body = {
        "messages": [
            {
                "role": "developer",
                "content": [{"type": "text", "text": "be brief"}, {"type": "text", "text": "be kind"}],
            },
            {"role": "assistant", "content": "yes", "tool_calls": None, "refusal": None},
            {"role": "user", "content": "hi", "name": "ann"},
        ],
        "model": "tiny",
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "someone",
        "metadata": {"a": "b"},
        "stop": None,
        "seed": -7,
        "logit_bias": {"5": -100, "6": 3.5},
        "stream_options": None,
        "chat_template_kwargs": {"enable_thinking": False},
        "service_tier": "auto",
        "safety_identifier": "someone",
        "prompt_cache_key": "something",
        "prompt_cache_retention": "24h",
    }
    call = await router.post(CHAT, body).done()
    assert call.status == 200, call.body
    replica = next(iter(router.members))
    sampling = replica.opens[-1].job.sampling
    assert sampling.logit_bias == {5: -100, 6: 3.5}
    assert 0 <= sampling.seed < 2**63


async def test_completions_ignore_what_chat_ignores(router: RouterHarness) -> None:
    options = {"include_usage": False, "include_obfuscation": True}
    call = await router.complete(store=False, service_tier="default", user="a", stream_options=options).done()
    assert call.status == 200, call.body


@pytest.mark.parametrize("top_k", [-1, 0, 2**31, 2.0**31])
async def test_a_top_k_beyond_the_vocabulary_is_none(router: RouterHarness, top_k: float) -> None:
    assert (await router.complete(top_k=top_k).done()).status == 200
    assert next(iter(router.members)).opens[-1].job.sampling.top_k == 0


async def test_whole_numbers_may_be_written_as_floats(router: RouterHarness) -> None:
    fields = {"max_tokens": 16.0, "min_tokens": 2.0, "top_k": 5.0, "seed": -7.0, "n": 1.0, "stop_token_ids": [5.0]}
    assert (await router.complete(**fields, logprobs=2.0).done()).status == 200
    sampling = next(iter(router.members)).opens[-1].job.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.top_k, sampling.logprobs) == (16, 2, 5, 2)
    assert sampling.stop_token_ids == (5,)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", CHAT, 405), ("POST", "/v1/models", 405), ("GET", "/v1/models/other", 404)],
)
async def test_wrong_paths_and_methods(router: RouterHarness, method: str, path: str, status: int) -> None:
    call = await Call(router.app, method, path, b"", {}).done()
    assert call.status == status
    assert path in call.json["error"]["message"] or "other" in call.json["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses",
        "/v1/responses/resp_1/input_items",
        "/v1/embeddings",
        "/v1/audio/transcriptions",
        "/v1/audio/speech",
        "/v1/images/generations",
        "/v1/moderations",
        "/v1/files",
        "/v1/batches",
        "/v1/fine_tuning/jobs",
        "/v1/assistants",
        "/v1/rerank",
        "/v1",
        "/",
    ],
)
async def test_endpoints_that_are_not_there_say_what_is(router: RouterHarness, method: str, path: str) -> None:
    call = await Call(router.app, method, path, b'{"model": "tiny"}', {}).done()
    assert (call.status, call.headers["content-type"]) == (404, "application/json")
    error = call.json["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "not_found", None)
    assert (
        f"there is nothing at {path}; this server generates text, its endpoints are /v1/chat/comp" in error["message"]
    )
    assert "/v1/models/{model}, " in error["message"]
    assert error["message"].endswith("/openapi.json")


async def test_models(router: RouterHarness) -> None:
    (card,) = (await router.get("/v1/models").done()).json["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 256)
    assert (await router.get("/v1/models/tiny").done()).json == card


async def test_tokenize_and_back(router: RouterHarness) -> None:
    one = (await router.post("/tokenize", {"prompt": "grüße 😀"}).done()).json
    assert one["count"] == len(one["tokens"])
    assert one["max_model_len"] == 256
    bare = (await router.post("/tokenize", {"prompt": "grüße 😀", "add_special_tokens": False}).done()).json
    assert one["tokens"][1:] == bare["tokens"]
    many = (await router.post("/tokenize", {"prompt": ["a", "grüße 😀"]}).done()).json
    assert many["tokens"][1] == one["tokens"]
    assert many["count"] == [len(ids) for ids in many["tokens"]]
    back = (await router.post("/v1/detokenize", {"tokens": one["tokens"]}).done()).json
    assert back == {"text": "grüße 😀", "prompt": "grüße 😀"}
    assert (await router.post("/detokenize", {"tokens": many["tokens"]}).done()).json["text"] == ["a", "grüße 😀"]
    shown = await router.post("/detokenize", {"tokens": one["tokens"], "skip_special_tokens": False}).done()
    assert shown.json["text"] == "<s>grüße 😀"
    named = (await router.post("/v1/tokenize", {"prompt": "a fox", "return_token_strs": True}).done()).json
    assert "".join(named["token_strs"]) == "<s>a fox"


async def test_a_conversation_is_tokenised_as_chat_would(router: RouterHarness) -> None:
    prefill, _ = await router.pair(automatic=True)
    found = (await router.post("/tokenize", {"messages": USER}).done()).json
    await router.post(CHAT, {"messages": USER, "max_tokens": 1}).done()
    assert found["tokens"] == prefill.opens[0].job.prompt
    assert found["count"] == len(found["tokens"])
    for body in ({}, {"prompt": "a", "messages": USER}, {"messages": []}):
        assert (await refused(router, "/tokenize", body))["param"] == "prompt"


@pytest.mark.parametrize("tokens", [[], ["a"], [-1], [10**9], [1.5], [[1], 2], "a"])
async def test_detokenize_refuses_what_are_no_tokens(router: RouterHarness, tokens: Any) -> None:
    assert (await refused(router, "/detokenize", {"tokens": tokens}))["param"].startswith("tokens")


async def test_long_prompts_are_tokenised_in_a_thread(tmp_path: Path) -> None:
    async with running_router(tmp_path, thread_characters=3) as router:
        replica = await router.add("both", ReplicaRole.AGGREGATED, automatic=True)
        assert (await router.complete(prompt="the lazy dog", stream=False).done()).status == 200
        assert TOKENIZER.decode(replica.opens[0].job.prompt) == "the lazy dog"


async def test_a_model_without_chat_template_says_so(tmp_path: Path) -> None:
    async with running_router(tmp_path, chat_template=None) as router:
        call = await router.post(CHAT, {"messages": USER}).done()
        assert call.status == 400
        assert call.json["error"]["code"] == "no_chat_template"


async def test_what_the_template_refuses_is_a_400(tmp_path: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    async with running_router(tmp_path, chat_template=template) as router:
        call = await router.post(CHAT, {"messages": USER}).done()
        assert call.status == 400
        assert "roles must alternate" in call.json["error"]["message"]


async def test_a_body_that_does_not_arrive(tmp_path: Path) -> None:
    async with running_router(tmp_path, body_timeout_s=0.02) as router:
        call = await Call(router.app, "POST", CHAT, None, {}).done()
        assert call.status == 408


async def test_a_deeply_nested_value_is_refused_as_another(router: RouterHarness) -> None:
    for depth in range(700, 1000):  # where what can be read cannot be written lies with the stack's depth
        call = await router.post(COMPLETIONS, b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}").done()
        assert call.status == 400, (depth, call.body)


def test_of_what_is_too_deep_to_write_the_beginning_is_shown() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "[" * 97 + "..."


HALF = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"city": "\\ud83d"}'}}


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, HERMES])
async def test_half_a_character_in_an_earlier_call_stays_as_it_was_sent(tmp_path: Path, template: str) -> None:
    messages = [*USER, {"role": "assistant", "tool_calls": [HALF]}, {"role": "tool", "content": "5"}]
    async with running_router(tmp_path, chat_template=template, context_length=2048) as router:
        replica = await router.add("both", ReplicaRole.AGGREGATED, automatic=True)
        call = await router.post(CHAT, {"messages": messages, "max_tokens": 2}).done()
        assert call.status == 200, call.body
        told = await router.post("/tokenize", {"messages": messages}).done()
        assert (told.status, told.json["tokens"]) == (200, replica.opens[0].job.prompt)
        if template == HERMES:
            assert "ud83d" in TOKENIZER.decode(replica.opens[0].job.prompt)
