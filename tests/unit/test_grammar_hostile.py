"""Grammars that go round in circles, repeat without end or nest without bound: they work, or are refused in words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.grammar.constraint import Constraint, GrammarMismatch
from engine.grammar.errors import GrammarRefused
from protocol.sampling import Grammar
from router.api.grammar_reader import GrammarReader
from router.errors import ApiError
from tests.unit.grammars import COMPILER, END, TOKENIZER

pytestmark = pytest.mark.timeout(60)


def ebnf(text: str) -> Grammar:
    return Grammar(kind="ebnf", text=text, field="ebnf")


def matches(grammar: Grammar, text: str) -> bool:
    try:
        Constraint(COMPILER.compile(grammar), [*TOKENIZER.encode(text), END])
    except GrammarMismatch:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ('root ::= root "a" | "b"', ["b", "baaa"], ["", "a", "ab", "bb"]),
        ('root ::= x "a" | "b"\nx ::= root "c" | "d"', ["b", "da", "bca", "dacaca"], ["", "d", "bc", "a"]),
        ('root ::= e root "a" | "b"\ne ::= "" | "c"', ["b", "ba", "cba", "ccbaaa"], ["", "cb", "a"]),
        ('root ::= root root | "a"', ["a", "aaaa"], ["", "b"]),
        ('root ::= root | "a"', ["a"], ["", "aa"]),
        ('root ::= x | "b"\nx ::= y | "c"\ny ::= root', ["b", "c"], ["", "bc"]),
        ('root ::= root? "a"', ["a", "aaa"], ["", "b"]),
        ('root ::= (("a"?)*)* "b"', ["b", "aab"], ["", "a"]),
        ('root ::= ("")* "a"', ["a"], ["", "aa"]),
        ('root ::= root root | ""', [""], ["a"]),
    ],
)
def test_left_recursion_and_empty_repetitions_mean_what_they_say(text: str, good: list[str], bad: list[str]) -> None:
    for each in good:
        assert matches(ebnf(text), each), each
    for each in bad:
        assert not matches(ebnf(text), each), each


@pytest.mark.parametrize(
    "grammar",
    [
        ebnf("root ::= root"),
        ebnf("root ::= x\nx ::= y\ny ::= root"),
        ebnf('root ::= root "a"'),
        ebnf('root ::= "a"{1,1000000000000000000000000000}'),
        ebnf("root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000),
        Grammar(kind="regex", text="(" * 100_000 + "a" + ")" * 100_000, field="regex"),
        Grammar(kind="regex", text="a" + "*" * 100_000, field="regex"),
        Grammar(kind="regex", text="[" * 200_000, field="regex"),
        Grammar(kind="structural_tag", text=json.dumps({"format": {"type": "or", "elements": []}}), field="tag"),
        Grammar(
            kind="structural_tag",
            text=json.dumps({"type": "structural_tag", "format": {"type": "grammar", "grammar": "root ::= root"}}),
            field="tag",
        ),
        Grammar(
            kind="structural_tag",
            text=json.dumps(
                {"type": "structural_tag", "format": {"type": "regex", "pattern": "(" * 50_000 + "a" + ")" * 50_000}}
            ),
            field="tag",
        ),
        Grammar(
            kind="json_schema",
            text=json.dumps({"type": "string", "pattern": "(" * 50_000 + "a" + ")" * 50_000}),
            field="schema",
        ),
    ],
    ids=range(12),
)
def test_what_can_never_be_written_or_is_nested_without_bound_is_refused(grammar: Grammar) -> None:
    with pytest.raises(GrammarRefused):
        COMPILER.compile(grammar)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ],
)
def test_definitions_that_only_name_each_other_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="circle") as caught:
        GrammarReader().schema(schema, "json_schema")
    assert caught.value.status == 400


LIST = {"type": "array", "items": {"$ref": "#/$defs/list"}}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"$defs": {"list": LIST}, "$ref": "#/$defs/list"}, ["[]", "[[],[[]]]"], ["[1]", "[["]),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, ["null"], ["[]"]),
        (
            {
                "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]}, "b": {"$ref": "#/$defs/a"}},
                "$ref": "#/$defs/a",
            },
            ["null"],
            ["0"],
        ),
    ],
)
def test_definitions_that_come_back_to_themselves_are_followed(
    schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    grammar = GrammarReader().schema(schema, "json_schema")
    for each in good:
        assert matches(grammar, each), each
    for each in bad:
        assert not matches(grammar, each), each
