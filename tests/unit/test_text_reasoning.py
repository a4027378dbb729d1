"""Reasoning and answer told apart, wherever the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text_tools import SIZES, calls_of, content_of, cut

from text.message import MessageReader
from text.message_events import Event, Reasoning, merged
from text.reasoning import ReasoningSplitter, ReasoningStyle, Thinking, choose_style, thinking_after
from text.tools.families import HERMES
from text.tools.parser import ToolParser

PIECES = ["<think>", "</think>", "<th", "ink>", "</", "<", "think", "\n", "\n\n", " ", "so", "ü😀", "/think>"]


def split(thinking: Thinking, pieces: list[str]) -> tuple[str, str]:
    """(the reasoning, the content)."""
    splitter = ReasoningSplitter(thinking)
    events = [event for piece in pieces for event in splitter.feed(piece)] + splitter.finish()
    return reasoning_of(events), content_of(events)


def bare(text: str) -> str:
    return "".join(text.split())


def reasoning_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Reasoning))


@pytest.mark.parametrize(
    ("thinking", "text", "reasoning", "content"),
    [
        (Thinking.OPEN, "so\nit is\n</think>\n\n42", "so\nit is", "42"),
        (Thinking.OPEN, "<think>\nso</think>42", "so", "42"),
        (Thinking.OPEN, "\nso", "so", ""),
        (Thinking.OPEN, "so</thi", "so</thi", ""),
        (Thinking.OPEN, "so\n\n", "so\n\n", ""),
        (Thinking.OPEN, "</think>42", "", "42"),
        (Thinking.OPEN, "a</think>b</think>c", "a", "b</think>c"),
        (Thinking.FREE, "<think>so</think>\n42\n", "so", "42\n"),
        (Thinking.FREE, "\n<think>so</think>42", "so", "42"),
        (Thinking.FREE, "42 <think>so</think>", "", "42 <think>so</think>"),
        (Thinking.FREE, "  42", "", "  42"),
        (Thinking.FREE, " <th", "", " <th"),
        (Thinking.FREE, "<think>", "", ""),
        (Thinking.CLOSED, "<think>so</think>42", "", "<think>so</think>42"),
    ],
)
def test_what_is_thought_and_what_is_said(thinking: Thinking, text: str, reasoning: str, content: str) -> None:
    for sizes in ([max(1, len(text))], [1], [3, 2]):
        assert split(thinking, cut(text, sizes)) == (reasoning, content)


@pytest.mark.parametrize("thinking", Thinking)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12), sizes=SIZES)
def test_cuts_change_nothing_and_only_tags_are_lost(thinking: Thinking, pieces: list[str], sizes: list[int]) -> None:
    text = "".join(pieces)
    reasoning, content = split(thinking, [text])
    assert split(thinking, cut(text, sizes)) == (reasoning, content)
    left = bare(text)
    possible = [left, left.removeprefix("<think>"), left.replace("</think>", "", 1)]
    assert bare(reasoning + content) in [*possible, left.removeprefix("<think>").replace("</think>", "", 1)]


def test_tags_never_leave_in_part() -> None:
    splitter = ReasoningSplitter(Thinking.FREE)
    assert splitter.feed("<thi") == []
    assert splitter.feed("nk>\n") == []
    assert splitter.feed("so\n") == [Reasoning("so")]
    assert splitter.feed("on</th") == [Reasoning("\non")]
    assert splitter.feed("ink") == []
    assert splitter.feed(">\n") == []
    assert splitter.thought == len("<think>\nso\non</think>")
    assert content_of(splitter.feed("\n42")) == "42"


@pytest.mark.parametrize(
    ("prompt", "style", "continued", "thinking"),
    [
        ("user: <think>", "qwen3", None, Thinking.OPEN),
        ("assistant\n<think>\n", "qwen3", None, Thinking.OPEN),
        ("assistant\n<think>\n\n</think>\n\n", "deepseek-r1", None, Thinking.CLOSED),
        ("assistant\n", "deepseek-r1", None, Thinking.OPEN),
        ("assistant\n", "qwen3", None, Thinking.FREE),
        ("assistant\n<think>so", "qwen3", "<think>so", Thinking.OPEN),
        ("assistant\n<think>so</think>4", "deepseek-r1", "<think>so</think>4", Thinking.CLOSED),
        ("assistant\nIt is", "deepseek-r1", "It is", Thinking.CLOSED),
        ("assistant\n", "deepseek-r1", "", Thinking.OPEN),
    ],
)
def test_the_prompt_says_how_its_output_begins(
    prompt: str, style: ReasoningStyle, continued: str | None, thinking: Thinking
) -> None:
    assert thinking_after(prompt, style, continued=continued) is thinking


def test_the_style_follows_from_the_template() -> None:
    assert choose_style("auto", "{% if enable_thinking %}<think>") == "qwen3"
    assert choose_style("auto", "no tags") is None
    assert choose_style("none", "<think>") is None
    assert choose_style("deepseek-r1", "no tags") == "deepseek-r1"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=SIZES)
def test_a_message_with_everything(sizes: list[int]) -> None:
    text = '<think>\nI <tool_call> {"name": "find"}\n</think>\n\nOne moment.\n<tool_call>{"name": "find"}</tool_call>\n'
    reader = MessageReader(reasoning=ReasoningSplitter(Thinking.FREE), tools=ToolParser(HERMES.read, {"find"}))
    events = merged([*(event for piece in cut(text, sizes) for event in reader.feed(piece)), *reader.finish()])
    assert reasoning_of(events) == 'I <tool_call> {"name": "find"}'
    assert content_of(events) == "One moment.\n"
    assert calls_of(events) == [("find", "{}")]
