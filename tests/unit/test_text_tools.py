"""Calls of tools in generated text: every family's format, cut anywhere, whole or broken."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text.message_events import CallArguments, CallStart, Content, Event, merged
from text.tools.families import (
    DEEPSEEK,
    DEEPSEEK_BARE,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_NAMED,
    PYTHONIC,
    ToolFamily,
    choose_family,
)
from text.tools.json_scanner import JsonScanner
from text.tools.parser import ToolParser
from text.tools.source import MAX_AHEAD

FAMILIES = [HERMES, LLAMA3, PYTHONIC, MISTRAL, MISTRAL_NAMED, DEEPSEEK, DEEPSEEK_BARE]
NAMES = {"find", "get_time", "a.b-c"}
QUICK = settings(max_examples=60, deadline=None, derandomize=True)

PIECES = [
    *("<tool_call>", "</tool_call>", "<tool_", "call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *("<|python_start|>", "<|python_end|>", *DEEPSEEK.markers, "function", "\n```json\n", "\n```"),
    *('{"name": "find", "arguments": ', '{"name": "find", "parameters": {', '{"name": "nobody", "arguments": {}}'),
    *('"name"', '"arguments"', '"find"', "find", ".call", "find(", "[find(", "get_time()", "k=", "k2=", "()", "'", '"'),
    *(
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        ";",
        "\\",
        '\\"',
        "\\u00",
        "\\ud83d",
        "true",
        "null",
        "1",
        "-",
        " ",
        "\n",
        "<",
        "|",
    ),
    *("Q", "XX", "ü", "😀", "ZQ Z", '{"Q": "}]"}', '"X\\n"'),
]
PAYLOAD = frozenset("QXZü😀")
"""Characters of no syntax."""


def cut(text: str, sizes: Sequence[int]) -> list[str]:
    """`text` in pieces of these sizes, over and over."""
    pieces, at = [], 0
    for number in range(len(text)):
        if at >= len(text):
            break
        size = sizes[number % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    return pieces


def parse(family: ToolFamily, pieces: Sequence[str]) -> list[Event]:
    parser = ToolParser(family.read, NAMES)
    events = [event for piece in pieces for event in parser.feed(piece)]
    assert all(isinstance(event, CallStart) or event.text for event in events), "nothing empty is sent"
    return merged([*events, *parser.finish()])


def calls_of(events: Sequence[Event]) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, CallStart):
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return calls


def content_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def written(family: ToolFamily, calls: Sequence[tuple[str, str]]) -> str:
    form = family.form
    each = [form.before + name + form.between + arguments + form.after for name, arguments in calls]
    return form.opening + form.separator.join(each) + form.closing


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=5)
ARGUMENTS = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
@QUICK
@given(
    calls=st.lists(st.tuples(st.sampled_from(sorted(NAMES)), ARGUMENTS), min_size=1, max_size=3),
    content=st.sampled_from(["", "Let me see.\n", "grüße 😀 <tool> (a) "]),
    indent=st.sampled_from([None, 2]),
    plain=st.booleans(),
    sizes=SIZES,
)
def test_calls_come_out_as_they_were_written(
    family: ToolFamily,
    calls: list[tuple[str, dict[str, object]]],
    content: str,
    indent: int | None,
    plain: bool,
    sizes: list[int],
) -> None:
    texts = [(name, json.dumps(arguments, indent=indent, ensure_ascii=plain)) for name, arguments in calls]
    events = parse(family, cut(content + written(family, texts), sizes))
    assert calls_of(events) == texts
    assert content_of(events) == content


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
@QUICK
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=30), sizes=SIZES)
def test_hostile_texts_lose_nothing_wherever_they_are_cut(
    family: ToolFamily, pieces: list[str], sizes: list[int]
) -> None:
    text = "".join(pieces)
    whole = parse(family, [text])
    assert parse(family, cut(text, sizes)) == whole
    kept = "".join(event.name if isinstance(event, CallStart) else event.text for event in whole)
    assert [char for char in kept if char in PAYLOAD] == [char for char in text if char in PAYLOAD]
    if not any(isinstance(event, CallStart) for event in whole):
        assert content_of(whole) == text


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_calls_cut_short_are_calls_once_their_arguments_have_begun(family: ToolFamily) -> None:
    arguments = '{"city": "Köln", "days": [1, 2]}'
    text = written(family, [("find", arguments)])
    begun = text.index(arguments)
    for end in range(len(text) + 1):
        events = parse(family, [text[:end]])
        if end <= begun:
            assert calls_of(events) == []
            assert content_of(events) == text[:end]
        else:
            assert calls_of(events) == [("find", arguments[: end - begun])]
            assert text[begun + len(arguments) : end].endswith(content_of(events))


@pytest.mark.parametrize(
    ("family", "text", "calls", "content"),
    [
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "find"}</tool_call>', [("find", '{"a": 1}')], ""),
        (HERMES, '<tool_call>{"name": "find"}</tool_call>', [("find", "{}")], ""),
        (HERMES, '<tool_call>{"name": "find", "arguments": null}</tool_call>', [("find", "{}")], ""),
        (HERMES, '<tool_call>{"type": "function", "name": "find", "arguments": {}}', [("find", "{}")], ""),
        (HERMES, '<tool_call>{"name": "other"}</tool_call>', [], '<tool_call>{"name": "other"}</tool_call>'),
        (HERMES, '<tool_call><tool_call>{"name": "find"}', [("find", "{}")], "<tool_call>"),
        (HERMES, '<tool_call>{"name": "find", "arguments": "a"}', [], '<tool_call>{"name": "find", "arguments": "a"}'),
        (HERMES, '<tool_call>{"name": "find", "arguments": {"a": 1,}}', [("find", '{"a": 1,')], "}}"),
        (HERMES, '<tool_call>{"name": "find", "arguments": {}, "x": 1}', [("find", "{}")], ', "x": 1}'),
        (HERMES, "\n  \n", [], "\n  \n"),
        (HERMES, '\n<tool_call>{"name": "find"}</tool_call>\n', [("find", "{}")], ""),
        (HERMES, '<tool_call>{"name": "find"}</tool_call>\nyes', [("find", "{}")], "\nyes"),
        (LLAMA3, '{"name": "find", "parameters": {}};{"name": "find"}', [("find", "{}"), ("find", "{}")], ""),
        (LLAMA3, '{"name": "find", "parameters": {}}; so', [("find", "{}")], "; so"),
        (LLAMA3, '<|python_tag|>{"name": "find", "parameters": {"a": 1}}', [("find", '{"a": 1}')], ""),
        (LLAMA3, '<|python_tag|>find.call(q="a, b)", n=-2)', [("find", '{"q": "a, b)", "n": -2}')], ""),
        (LLAMA3, "<|python_tag|>print(1)", [], "<|python_tag|>print(1)"),
        (LLAMA3, '{"answer": 42}', [], '{"answer": 42}'),
        (MISTRAL, '[TOOL_CALLS][{"name": "find", "arguments": {}, "id": "Ab3"}]', [("find", "{}")], ""),
        (MISTRAL, '[TOOL_CALLS]find[CALL_ID]Ab3[ARGS]{"a": 1}', [("find", '{"a": 1}')], ""),
        (MISTRAL, '[TOOL_CALLS]find{"a": 1}', [("find", '{"a": 1}')], ""),
        (MISTRAL, "[TOOL_CALLS][]", [], "[TOOL_CALLS][]"),
        (MISTRAL, '[TOOL_CALLS][{"name": "find"}, then', [("find", "{}")], ", then"),
        (PYTHONIC, "[find(), get_time(a='it\\'s')]", [("find", "{}"), ("get_time", '{"a": "it\'s"}')], ""),
        (PYTHONIC, '<|python_start|>[find(a="""x"y""",)]<|python_end|>', [("find", '{"a": "x\\"y"}')], ""),
        (PYTHONIC, "[find(a={'k': (1, None, True)})]", [("find", '{"a": {"k": [1, null, true]}}')], ""),
        (PYTHONIC, "[find(a=true, b=null)]", [("find", '{"a": true, "b": null}')], ""),
        (PYTHONIC, "[find(a='\\d', b='\\ud83d')]", [("find", '{"a": "\\\\d"')], ", b='\\ud83d')]"),
        (PYTHONIC, "[find(1)]", [("find", "")], "1)]"),
        (PYTHONIC, "[find(a=1, a=2)]", [("find", '{"a": 1')], ", a=2)]"),
        (PYTHONIC, "[find(a=__import__('os'))]", [("find", "")], "a=__import__('os'))]"),
        (PYTHONIC, "see [1] and [find]", [], "see [1] and [find]"),
    ],
)
def test_variants_and_oddities(family: ToolFamily, text: str, calls: list[tuple[str, str]], content: str) -> None:
    for sizes in ([len(text)], [1], [3, 2]):
        events = parse(family, cut(text, sizes))
        assert calls_of(events) == calls
        assert content_of(events) == content


def test_names_and_arguments_leave_as_soon_as_they_are_clear() -> None:
    parser = ToolParser(HERMES.read, NAMES)
    assert parser.feed("Let me") == [Content("Let me")]
    assert parser.feed(" see <tool") == [Content(" see ")]
    assert parser.feed('_call>{"name": "find", "argum') == []
    assert parser.feed('ents": ') == []
    assert parser.feed('{"ci') == [CallStart("find"), CallArguments('{"ci')]
    assert parser.feed('ty": "Kö') == [CallArguments('ty": "Kö')]
    assert parser.feed('ln"}}</tool_call>') == [CallArguments('ln"}')]
    assert parser.finish() == []


def test_no_more_is_held_back_than_a_call_may_need() -> None:
    parser = ToolParser(HERMES.read, NAMES)
    text = '<tool_call>{"id": "' + "x" * 2 * MAX_AHEAD
    assert content_of(parser.feed(text)) == text


def test_deep_nesting_is_read_without_recursion() -> None:
    arguments = '{"a": ' + "[" * 5000 + "]" * 5000 + "}"
    assert calls_of(parse(HERMES, [written(HERMES, [("find", arguments)])])) == [("find", arguments)]
    text = "[find(a=" + "[" * 5000 + "]" * 5000 + ")]"
    assert content_of(parse(PYTHONIC, [text])).startswith("a=[[[")


@QUICK
@given(value=ARGUMENTS, sizes=SIZES, rest=st.sampled_from(["", " ", ",", "}", "x"]))
def test_the_scanner_takes_exactly_one_value(value: dict[str, object], sizes: list[int], rest: str) -> None:
    text = json.dumps(value)
    scanner, taken = JsonScanner(), 0
    for piece in cut(text + rest, sizes):
        taken += scanner.scan(piece, 0)
        assert not scanner.failed
        if scanner.done:
            break
    assert (taken, scanner.done) == (len(text), True)


@pytest.mark.parametrize(
    "text",
    [
        *("[1,]", "{,}", '{"a"}', '{"a":}', "{1:2}", '["\\x"]', '["\\u12g4"]', "[01]", "[1.]", "[1.e5]", "[-]", "[1e]"),
        *("[tru]", "[nul l]", '["\n"]', "[}", '{"a": 1]', "[+1]", "[NaN]", "[.5]", "['a']", "[1 2]", f"[{'9' * 400}]"),
    ],
)
def test_the_scanner_refuses_what_is_no_json(text: str) -> None:
    scanner = JsonScanner()
    scanner.scan(text, 0)
    assert scanner.failed


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{{ '<tool_call>' }}", HERMES),
        ("[TOOL_CALLS] [", MISTRAL),
        ("[TOOL_CALLS]{{ name }}[ARGS]", MISTRAL_NAMED),
        (DEEPSEEK.form.opening + " ```json", DEEPSEEK),
        (DEEPSEEK.form.opening, DEEPSEEK_BARE),
        ("<|python_tag|>", LLAMA3),
        ('<|start_header_id|> {"name": x, "parameters": y}', LLAMA3),
        ("<|python_start|> <|python_tag|>", PYTHONIC),
        ("", HERMES),
    ],
)
def test_the_family_follows_from_the_template(template: str, family: ToolFamily) -> None:
    assert choose_family("auto", template) is family
    assert choose_family("none", template) is None
    assert choose_family("llama3", template) is LLAMA3
