"""litellm against an OpenAI-compatible server: chat, completions, streams, tools, structured output, errors."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import litellm
import pytest

pytestmark = pytest.mark.clients

MODEL = "openai/SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
    "additionalProperties": False,
}


@pytest.fixture
def options(api: str) -> dict[str, Any]:
    return {"model": MODEL, "api_base": api, "api_key": "none", "temperature": 0, "timeout": 60, "num_retries": 0}


def test_chat_is_the_same_streamed_and_not(options: dict[str, Any]) -> None:
    whole = litellm.completion(messages=QUESTION, max_tokens=24, **options)
    stream = litellm.completion(messages=QUESTION, max_tokens=24, stream=True, **options)
    assert "Paris" in whole.choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0


def test_completions(options: dict[str, Any]) -> None:
    options["model"] = MODEL.replace("openai/", "text-completion-openai/")
    done = litellm.text_completion(prompt="The capital of France is", max_tokens=8, **options)
    assert "Paris" in done.choices[0].text


def test_a_schema_is_kept(options: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    done = litellm.completion(messages=QUESTION, max_tokens=200, response_format=form, **options)
    assert done.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(done.choices[0].message.content), SCHEMA)


def test_a_required_tool_is_called(options: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
    options |= {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    done = litellm.completion(messages=QUESTION, max_tokens=200, **options)
    assert done.choices[0].finish_reason == "tool_calls"
    (call,) = done.choices[0].message.tool_calls
    assert call.function.name == "look_up"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_errors_become_the_librarys_own(options: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=QUESTION, **(options | {"temperature": -1}))
    with pytest.raises(litellm.NotFoundError, match="no-such-model"):
        litellm.completion(messages=QUESTION, **(options | {"model": "openai/no-such-model"}))
