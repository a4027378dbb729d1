"""Chat beyond plain text: tools, reasoning, prefilled messages, templates. Streamed and whole are always the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import chat_templates as templates
import pytest
import tokenizers
from pydantic import TypeAdapter
from router_harness import END_ID, SECRET, TOKENIZER, Call, FakeReplica, RouterHarness, running_router, until
from tiny_tokenizers import save_model_folder

from protocol.membership import ReplicaRole
from protocol.rooms import Job, OpenGenerate
from protocol.sampling import FinishReason
from router.api.chat_tools import Tool, plan_tools
from router.app import build_asgi
from router.config import RouterConfig
from text.tokenizer import Tokenizer
from text.tools.families import choose_family

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "how late is it in Köln?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TIME = {"type": "function", "function": {"name": "get_time", "description": "the time", "parameters": SCHEMA}}
FIND = {"type": "function", "function": {"name": "find"}}
TOOLS = {"tools": [TIME, FIND]}
ARGUMENTS = '{"city": "Köln"}'


@contextlib.asynccontextmanager
async def chatting(folder: Path, template: str, **settings: Any) -> AsyncIterator[tuple[RouterHarness, FakeReplica]]:
    settings = {"context_length": 2048} | settings
    async with running_router(folder, chat_template=template, **settings) as router:
        yield router, await router.add("both", ReplicaRole.AGGREGATED)


async def ask(
    router: RouterHarness,
    replica: FakeReplica,
    text: str,
    *,
    finish: FinishReason = FinishReason.STOP_TOKEN,
    tokenizer: Tokenizer = TOKENIZER,
    **fields: Any,
) -> tuple[Call, list[Job]]:
    """One request, each choice of which is answered with `text`; a stream's tokens are taken one by one."""
    taken = router.metrics.output_tokens
    call = router.post(CHAT, {"messages": USER, **fields})
    jobs = []
    for _ in range(fields.get("n", 1)):
        opened = await replica.opened(OpenGenerate)
        jobs.append(opened.job)
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids = [*ids, END_ID] if finish is FinishReason.STOP_TOKEN else ids
        logprob = -0.5 if fields.get("logprobs") else None
        for position, token in enumerate(ids):
            end = finish if position == len(ids) - 1 else None
            before = taken.total
            replica.send(opened.room, position, token, finish=end, choice=opened.job.choice, logprob=logprob)
            if fields.get("stream"):
                await until(lambda before=before: taken.total > before)
    return await call.done(), jobs


def joined(call: Call, index: int = 0) -> dict[str, Any]:
    """The choice that a stream's chunks make, as the whole response has it."""
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    choice: dict[str, Any] = {"index": index, "message": message, "logprobs": None}
    for chunk in call.events[:-1]:
        for part in chunk["choices"]:
            if part["index"] != index:
                continue
            delta = part["delta"]
            if delta.get("content") is not None:
                message["content"] = (message["content"] or "") + delta["content"]
            if "reasoning_content" in delta:
                message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
            for piece in delta.get("tool_calls", []):
                calls = message.setdefault("tool_calls", [])
                if piece["index"] == len(calls):
                    assert piece["function"]["arguments"] == ""
                    calls.append({key: value for key, value in piece.items() if key != "index"})
                    calls[-1]["function"] = dict(piece["function"])
                else:
                    assert piece["index"] == len(calls) - 1
                    assert piece.keys() == {"index", "function"}
                    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
            if part["logprobs"]:
                choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
                choice["logprobs"]["content"] += part["logprobs"]["content"]
            if "token_ids" in part:
                choice["token_ids"] = choice.get("token_ids", []) + part["token_ids"]
            if part["finish_reason"]:
                choice |= {key: part[key] for key in ("finish_reason", "matched_stop")}
    return choice


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    for number, call in enumerate(choice["message"].get("tool_calls", [])):
        call["id"] = number
    return choice


async def both_ways(
    router: RouterHarness, replica: FakeReplica, text: str, **fields: Any
) -> tuple[dict[str, Any], Job]:
    """The choice of the whole response, which the stream's must equal, and the job that replicas got."""
    whole, (job,) = await ask(router, replica, text, **fields)
    assert whole.status == 200, whole.body
    streamed, _ = await ask(router, replica, text, stream=True, **fields)
    choice = without_ids(whole.json["choices"][0])
    assert without_ids(joined(streamed)) == choice
    return choice, job


CALLS = {
    "hermes": 'Let me look.\n<tool_call>\n{"name": "get_time", "arguments": ARGS}\n</tool_call>',
    "llama3": '{"name": "get_time", "parameters": ARGS}',
    "pythonic": '[get_time(city="Köln")]',
    "mistral": '[TOOL_CALLS][{"name": "get_time", "arguments": ARGS}]',
    "deepseek": templates.DEEPSEEK[templates.DEEPSEEK.index("<｜") : templates.DEEPSEEK.index("{% endfor %}<|im_end")],  # noqa: RUF001
}
CALLS["deepseek"] = (
    CALLS["deepseek"]
    .replace("{{ call.function.name }}", "get_time")
    .replace("{{ call.function.arguments | tojson }}", "ARGS")
)


@pytest.mark.parametrize("family", templates.FAMILIES)
async def test_calls_of_every_family(tmp_path: Path, family: str) -> None:
    async with chatting(tmp_path, templates.FAMILIES[family]) as (router, replica):
        text = CALLS[family].replace("ARGS", ARGUMENTS)
        choice, job = await both_ways(router, replica, text, **TOOLS)
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "get_time", "arguments": ARGUMENTS}
        assert call["type"] == "function"
        assert choice["message"]["content"] == ("Let me look.\n" if family == "hermes" else None)
        assert choice["finish_reason"] == "tool_calls"
        prompt = TOKENIZER.decode(job.prompt, skip_special_tokens=False)
        assert json.dumps(TIME["function"], ensure_ascii=False) in prompt
        assert job.sampling.grammar is None
        choice, _ = await both_ways(router, replica, "", **TOOLS)
        assert choice["message"] == {"role": "assistant", "content": "", "refusal": None}
        # cut short, it is a call with what there is of its arguments
        cut = text[: text.index("Köln") + 2]
        choice, _ = await both_ways(router, replica, cut, finish=FinishReason.LENGTH, **TOOLS)
        assert choice["finish_reason"] == "length"
        (call,) = choice["message"]["tool_calls"]
        assert ARGUMENTS.startswith(call["function"]["arguments"])


@pytest.mark.parametrize("family", templates.FAMILIES)
async def test_without_tools_there_are_no_calls(tmp_path: Path, family: str) -> None:
    async with chatting(tmp_path, templates.FAMILIES[family]) as (router, replica):
        text = CALLS[family].replace("ARGS", ARGUMENTS)
        for fields in ({}, {**TOOLS, "tool_choice": "none"}, {"tools": []}):
            choice, job = await both_ways(router, replica, text, **fields)
            assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
            assert choice["finish_reason"] == "stop"
            assert "tool:" not in TOKENIZER.decode(job.prompt)


async def test_calls_are_named_before_their_arguments_stream(tmp_path: Path) -> None:
    async with chatting(tmp_path, templates.HERMES) as (router, replica):
        call, _ = await ask(router, replica, CALLS["hermes"].replace("ARGS", ARGUMENTS), stream=True, **TOOLS)
        deltas = [event["choices"][0]["delta"] for event in call.events[:-1]]
        pieces = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        assert pieces[0]["function"] == {"name": "get_time", "arguments": ""}
        assert pieces[0]["id"].startswith("call_")
        assert len(pieces) > 3
        assert all(list(piece) == ["index", "function"] for piece in pieces[1:])


async def test_every_choice_has_calls_of_its_own(tmp_path: Path) -> None:
    async with chatting(tmp_path, templates.HERMES) as (router, replica):
        one = '<tool_call>{"name": "find"}</tool_call>'
        call, _ = await ask(router, replica, one + "\n" + one, n=2, **TOOLS)
        calls = [call for choice in call.json["choices"] for call in choice["message"]["tool_calls"]]
        assert len({call["id"] for call in calls}) == 4


async def test_histories_with_calls_reach_the_template(tmp_path: Path) -> None:
    async with chatting(tmp_path, templates.HERMES) as (router, replica):
        function = {"name": "get_time", "arguments": '{"city":  "Köln"}'}
        messages = [
            *USER,
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "so",
                "tool_calls": [{"id": "a", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "noon"}]},
        ]
        _, (job,) = await ask(router, replica, "noon", messages=messages)
        prompt = TOKENIZER.decode(job.prompt, skip_special_tokens=False)
        assert prompt.endswith(
            "assistant\n[so]<tool_call>"
            '{"name": "get_time", "arguments": {"city": "Köln"}}</tool_call><|im_end|>\n'
            "<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>assistant\n"
        )


async def test_templates_that_know_no_tools_are_told_in_words(tmp_path: Path) -> None:
    template = templates.HERMES[templates.HERMES.index("{% for message") :].replace("message.tool_calls", "[]")
    async with chatting(tmp_path, template) as (router, replica):
        call = {"id": "a", "type": "function", "function": {"name": "find", "arguments": "{}"}}
        messages = [
            *USER,
            {"role": "assistant", "content": "Hm.", "tool_calls": [call, call]},
            {"role": "tool", "tool_call_id": "a", "content": "noon"},
            {"role": "tool", "tool_call_id": "a", "content": "one"},
        ]
        text = CALLS["hermes"].replace("ARGS", ARGUMENTS)
        choice, job = await both_ways(router, replica, text, messages=messages, **TOOLS)
        assert choice["finish_reason"] == "tool_calls"
        prompt = TOKENIZER.decode(job.prompt, skip_special_tokens=False)
        assert prompt.startswith("<|im_start|>system\nYou can call these functions")
        assert json.dumps(TIME["function"]) in prompt
        written = '<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call>'
        assert f"assistant\nHm.\n{written}\n{written}<|im_end|>\n" in prompt
        results = "<tool_response>\nnoon\n</tool_response>\n<tool_response>\none\n</tool_response>"
        assert f"user\n{results}<|im_end|>\n" in prompt
        _, (job,) = await ask(router, replica, "x", messages=[{"role": "system", "content": "be kind"}, *USER], **TOOLS)
        assert "system\nbe kind\n\nYou can call" in TOKENIZER.decode(job.prompt, skip_special_tokens=False)


async def test_markers_that_are_special_tokens_are_seen(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path, chat_template=templates.MISTRAL)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["[TOOL_CALLS]", "[OTHER]"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    app = build_asgi(RouterConfig(model_name="tiny", tokenizer_folder=folder, context_length=2048, secret=SECRET))
    async with app.router.lifespan_context(app):
        router = RouterHarness(app)
        replica = await router.add("both", ReplicaRole.AGGREGATED)
        text = "[OTHER]" + CALLS["mistral"].replace("ARGS", ARGUMENTS)
        choice, job = await both_ways(router, replica, text, tokenizer=tokenizer, **TOOLS)
        assert choice["message"]["content"] is None
        assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == [ARGUMENTS]
        assert job.sampling.shown_special_ids == (backend.token_to_id("[TOOL_CALLS]"),)
        choice, job = await both_ways(router, replica, text, tokenizer=tokenizer)
        assert choice["message"]["content"] == text.replace("[OTHER]", "").replace("[TOOL_CALLS]", "")
        whole, _ = await ask(router, replica, text, tokenizer=tokenizer, **TOOLS)
        (call,) = whole.json["choices"][0]["message"]["tool_calls"]
        assert len(call["id"]) == 9
        assert call["id"].isalnum()
        replica.die()


@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"return_token_ids": True}])
async def test_reasoning_is_told_from_the_answer(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with chatting(tmp_path, templates.QWEN3) as (router, replica):
        text = "<think>\nhm, the quick fox\n</think>\n\nnoon"
        choice, _ = await both_ways(router, replica, text, **fields)
        assert choice["message"] == {
            "role": "assistant",
            "content": "noon",
            "refusal": None,
            "reasoning_content": "hm, the quick fox",
        }
        ids = TOKENIZER.encode(text, add_special_tokens=False)
        if "logprobs" in fields:
            assert len(choice["logprobs"]["content"]) == len(ids)
        if "return_token_ids" in fields:
            assert choice["token_ids"] == [*ids, END_ID]
        choice, _ = await both_ways(router, replica, text, include_reasoning=False, **fields)
        assert choice["message"] == {"role": "assistant", "content": "noon", "refusal": None}
        choice, _ = await both_ways(router, replica, text, separate_reasoning=False, **fields)
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        choice, _ = await both_ways(router, replica, "noon <think>", **fields)
        assert choice["message"]["content"] == "noon <think>"


@pytest.mark.parametrize("text", ["<think>\nhm, the fox\n</think>\n\nnoon", "<think>the lazy", "noon", ""])
async def test_reasoning_tokens_are_counted(tmp_path: Path, text: str) -> None:
    async with chatting(tmp_path, templates.QWEN3) as (router, replica):
        whole, _ = await ask(router, replica, text, finish=FinishReason.STOP_TOKEN)
        streamed, _ = await ask(router, replica, text, stream=True, stream_options={"include_usage": True})
        usage = whole.json["usage"]
        assert streamed.events[-2]["usage"] == usage
        thought, tag, _ = text.partition("</think>")
        ids = TOKENIZER.encode(thought + tag, add_special_tokens=False) if "<think>" in text else []
        assert usage["completion_tokens_details"] == {"reasoning_tokens": len(ids)}
        plain, _ = await ask(router, replica, text, separate_reasoning=False)
        assert "completion_tokens_details" not in plain.json["usage"]


async def test_reasoning_then_a_call_with_everything_asked_for(tmp_path: Path) -> None:
    async with chatting(tmp_path, templates.R1) as (router, replica):
        text = 'I could <tool_call>{"name": "find"}\n</think>\nYes.' + CALLS["hermes"].replace("ARGS", ARGUMENTS)
        choice, _ = await both_ways(router, replica, text, logprobs=True, return_token_ids=True, **TOOLS)
        message = choice["message"]
        assert message["reasoning_content"] == 'I could <tool_call>{"name": "find"}'
        assert message["content"] == "Yes.Let me look.\n"
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_time"]


async def test_thinking_can_be_turned_off_and_follows_the_prompt(tmp_path: Path) -> None:
    async with chatting(tmp_path, templates.QWEN3) as (router, replica):
        for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
            choice, job = await both_ways(router, replica, "<think>no</think>", **fields)
            assert TOKENIZER.decode(job.prompt).endswith("<think>\n\n</think>\n\n")
            assert choice["message"]["content"] == "<think>no</think>"
        choice, _ = await both_ways(router, replica, "<think>so</think>noon", reasoning_effort="high")
        assert choice["message"]["content"] == "noon"
    async with chatting(tmp_path, templates.HERMES, reasoning_parser="deepseek-r1") as (router, replica):
        choice, _ = await both_ways(router, replica, "so</think>noon")
        assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("so", "noon")
    async with chatting(tmp_path, templates.R1, reasoning_parser="none") as (router, replica):
        choice, _ = await both_ways(router, replica, "so</think>noon")
        assert choice["message"] == {"role": "assistant", "content": "so</think>noon", "refusal": None}


async def test_a_prefilled_message_is_continued(tmp_path: Path) -> None:
    async with chatting(tmp_path, templates.QWEN3) as (router, replica):
        messages = [*USER, {"role": "assistant", "content": "It is  "}]
        fields = {"messages": messages, "continue_final_message": True}
        choice, job = await both_ways(router, replica, "noon", **fields)
        assert TOKENIZER.decode(job.prompt, skip_special_tokens=False).endswith("<|im_start|>assistant\nIt is  ")
        assert choice["message"]["content"] == "noon"
        choice, _ = await both_ways(router, replica, "noon", echo=True, add_generation_prompt=False, **fields)
        assert choice["message"]["content"] == "It is  noon"
        messages[-1] = {"role": "assistant", "content": "<think>\nhm"}
        choice, _ = await both_ways(router, replica, "so</think>noon", **fields)
        assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("so", "noon")
        _, (job,) = await ask(router, replica, "noon", messages=messages, add_generation_prompt=False)
        assert TOKENIZER.decode(job.prompt, skip_special_tokens=False).endswith("hm<|im_end|>\n")


async def test_conversations_with_tools_may_have_a_template_of_their_own(tmp_path: Path) -> None:
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text(templates.LLAMA3)
    async with chatting(tmp_path, "plain {{ messages[0].content }}") as (router, replica):
        text = CALLS["llama3"].replace("ARGS", ARGUMENTS)
        choice, job = await both_ways(router, replica, text, **TOOLS)
        assert choice["finish_reason"] == "tool_calls"
        assert TOKENIZER.decode(job.prompt).startswith("tool: ")
        choice, job = await both_ways(router, replica, text)
        assert TOKENIZER.decode(job.prompt).startswith("plain ")
        assert choice["message"]["content"] == text


async def test_a_template_that_hides_the_final_message_cannot_continue_it(tmp_path: Path) -> None:
    async with chatting(tmp_path, "always the same") as (router, _):
        messages = [*USER, {"role": "assistant", "content": "It is"}]
        call = await router.post(CHAT, {"messages": messages, "continue_final_message": True}).done()
        assert call.status == 400
        assert call.json["error"]["code"] == "chat_template_error"


async def test_a_template_from_a_file_or_a_request(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("from a file: {{ messages[0].content }}{{ eos_token }}")
    settings = {"chat_template": file, "allow_request_chat_template": True}
    save_model_folder(tmp_path, chat_template=templates.HERMES)
    config = RouterConfig(model_name="tiny", tokenizer_folder=tmp_path, context_length=256, secret=SECRET, **settings)
    app = build_asgi(config)
    async with app.router.lifespan_context(app):
        router = RouterHarness(app)
        replica = await router.add("both", ReplicaRole.AGGREGATED)
        _, (job,) = await ask(router, replica, "noon")
        assert TOKENIZER.decode(job.prompt, skip_special_tokens=False) == f"from a file: {USER[0]['content']}<|im_end|>"
        _, (job,) = await ask(router, replica, "noon", chat_template="mine: {{ messages | length }}{{ eos_token }}")
        assert TOKENIZER.decode(job.prompt, skip_special_tokens=False) == "mine: 1<|im_end|>"
        call = await router.post(CHAT, {"messages": USER, "chat_template": "{% for %}"}).done()
        assert (call.status, call.json["error"]["param"]) == (400, "chat_template")
        replica.die()


async def test_a_missing_template_file_ends_the_start(tmp_path: Path) -> None:
    save_model_folder(tmp_path)
    settings = {"context_length": 256, "secret": SECRET, "chat_template": tmp_path / "nothing.jinja"}
    with pytest.raises(ValueError, match=r"nothing\.jinja cannot be read"):
        build_asgi(RouterConfig(model_name="tiny", tokenizer_folder=tmp_path, **settings))


async def test_no_parser_leaves_calls_in_the_text_and_promises_none(tmp_path: Path) -> None:
    async with chatting(tmp_path, templates.HERMES, tool_parser="none") as (router, replica):
        text = CALLS["hermes"].replace("ARGS", ARGUMENTS)
        choice, job = await both_ways(router, replica, text, **TOOLS)
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        assert "tool: " in TOKENIZER.decode(job.prompt)
        for fields, param in (({"tool_choice": "required"}, "tool_choice"), ({"parallel_tool_calls": False}, "tools")):
            call = await router.post(CHAT, {"messages": USER, **TOOLS, **fields}).done()
            assert (call.status, call.json["error"]["param"]) == (400, param)
            assert "router.tool_parser" in call.json["error"]["message"]


async def test_a_configured_parser_goes_before_the_template(tmp_path: Path) -> None:
    async with chatting(tmp_path, templates.HERMES, tool_parser="llama3") as (router, replica):
        choice, _ = await both_ways(router, replica, CALLS["llama3"].replace("ARGS", ARGUMENTS), **TOOLS)
        assert choice["finish_reason"] == "tool_calls"


async def test_what_ended_the_text_is_shown_on_request(tmp_path: Path) -> None:
    async with chatting(tmp_path, templates.HERMES) as (router, replica):
        for include in (True, False):
            call = router.post(CHAT, {"messages": USER, "stop": ["fox"], "include_stop_str_in_output": include})
            opened = await replica.opened(OpenGenerate)
            ids = TOKENIZER.encode("a fox", add_special_tokens=False)
            replica.send(opened.room, 0, *ids, finish=FinishReason.STOP_STRING, matched="fox")
            choice = (await call.done()).json["choices"][0]
            assert choice["message"]["content"] == ("a fox" if include else "a ")
            assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", "fox")


async def test_token_ids_stand_beside_the_text(tmp_path: Path) -> None:
    async with chatting(tmp_path, templates.HERMES) as (router, replica):
        whole, (job,) = await ask(router, replica, "noon", return_token_ids=True)
        assert whole.json["prompt_token_ids"] == job.prompt
        streamed, (job,) = await ask(router, replica, "noon", return_token_ids=True, stream=True)
        assert streamed.events[0]["prompt_token_ids"] == job.prompt


async def test_the_fingerprint_is_the_configuration_s(tmp_path: Path) -> None:
    prints = []
    for folder, template in (("a", templates.HERMES), ("b", templates.HERMES), ("c", templates.R1)):
        async with chatting(tmp_path / folder, template) as (router, replica):
            whole, _ = await ask(router, replica, "noon")
            streamed, _ = await ask(router, replica, "noon", stream=True)
            assert {event["system_fingerprint"] for event in streamed.events[:-1]} == {whole.json["system_fingerprint"]}
            prints.append(whole.json["system_fingerprint"])
    assert prints[0] == prints[1] != prints[2]
    assert prints[0].startswith("fp_")


def test_the_templates_are_those_of_their_families() -> None:
    for name, template in templates.FAMILIES.items():
        family = choose_family("auto", template)
        assert family is not None
        assert family.name == name


@pytest.mark.parametrize(
    ("choice", "parallel"),
    [("required", True), ({"type": "function", "function": {"name": "get_weather"}}, False)],
)
def test_a_named_tool_is_called_once(choice: Any, parallel: bool) -> None:
    tool = TypeAdapter(Tool).validate_python({"type": "function", "function": {"name": "get_weather"}})
    plan = plan_tools([tool], choice, parallel=True)
    assert plan.required
    assert plan.parallel == parallel
