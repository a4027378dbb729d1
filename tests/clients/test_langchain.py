"""langchain-openai: chat, completions, streams, batches, tools and structured output."""

from __future__ import annotations

from typing import Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

pytestmark = pytest.mark.clients

MODEL = "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"


class Weather(BaseModel):
    """The weather of a place."""

    city: str = Field(max_length=20)
    kind: Literal["sunny", "rainy", "snowy"]
    degrees: int


@pytest.fixture
def chat(api: str) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=api, api_key="none", model=MODEL, temperature=0, max_tokens=120, timeout=60, max_retries=0
    )


def test_invoke_and_stream_say_the_same(chat: ChatOpenAI) -> None:
    messages = [SystemMessage("You answer in one sentence."), HumanMessage(QUESTION)]
    whole = chat.invoke(messages)
    pieces = list(chat.stream(messages))
    assert "Paris" in whole.content
    assert "".join(piece.content for piece in pieces) == whole.content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0


def test_a_batch_answers_each(chat: ChatOpenAI) -> None:
    answers = chat.batch([f"Say the number {n}." for n in range(4)])
    assert all(answer.content for answer in answers)


def test_completions(api: str) -> None:
    model = OpenAI(base_url=api, api_key="none", model=MODEL, temperature=0, max_tokens=8, timeout=60, max_retries=0)
    whole = model.invoke("The capital of France is")
    assert "Paris" in whole
    assert "".join(model.stream("The capital of France is")) == whole


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_the_class_asked_for(
    chat: ChatOpenAI, method: Literal["json_schema", "function_calling"]
) -> None:
    structured = chat.with_structured_output(Weather, method=method)
    weather = structured.invoke("It is 30 degrees and sunny in Rome today.")
    assert isinstance(weather, Weather)


def test_a_forced_tool_is_called_and_its_result_read(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([Weather], tool_choice="Weather")
    question = HumanMessage("What is the weather in Rome?")
    call = bound.invoke([question])
    assert isinstance(call, AIMessage)
    (asked,) = call.tool_calls
    Weather.model_validate(asked["args"])
    answer = chat.invoke([question, call, ToolMessage("sunny, 30 degrees", tool_call_id=asked["id"])])
    assert answer.content
