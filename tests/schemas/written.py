"""Schemas, regular expressions and grammars written by hand, after what people ask models for."""

from __future__ import annotations

import ast
from typing import Any

from tests.schemas.cases import Case, ebnf_case, regex_case

_PERSON = {
    "title": "a person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": ["string", "null"], "pattern": "^[a-z.]{1,20}@[a-z]{1,10}\\.[a-z]{2,3}$"},
    },
    "required": ["name", "age", "email"],
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": _PERSON,
    "verdict": {
        "title": "a verdict on a film review",
        "type": "object",
        "properties": {
            "reasoning": {"type": "string", "maxLength": 80},
            "sentiment": {"enum": ["positive", "neutral", "negative"]},
            "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        },
        "required": ["reasoning", "sentiment", "confidence"],
        "additionalProperties": False,
    },
    "extraction": {
        "title": "an invoice",
        "type": "object",
        "properties": {
            "number": {"type": "string", "pattern": "^INV-\\d{4,6}$"},
            "issued": {"type": "string", "format": "date"},
            "lines": {
                "type": "array",
                "minItems": 1,
                "maxItems": 2,
                "items": {
                    "type": "object",
                    "properties": {
                        "text": {"type": "string", "maxLength": 20},
                        "amount": {"type": "number", "exclusiveMinimum": 0, "maximum": 10000},
                    },
                    "required": ["text", "amount"],
                },
            },
            "currency": {"enum": ["EUR", "USD"]},
        },
        "required": ["number", "issued", "lines", "currency"],
    },
    "tree": {
        "title": "a tree of at most a few nodes",
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["value", "children"],
            }
        },
    },
    "action": {
        "title": "the next step of an assistant",
        "oneOf": [
            {
                "type": "object",
                "properties": {"type": {"const": "search"}, "query": {"type": "string", "maxLength": 30}},
                "required": ["type", "query"],
            },
            {
                "type": "object",
                "properties": {"type": {"const": "answer"}, "text": {"type": "string", "maxLength": 60}},
                "required": ["type", "text"],
            },
        ],
    },
    "old draft": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "a point",
        "definitions": {"ordinate": {"type": "number", "minimum": -90, "maximum": 90}},
        "type": "array",
        "items": [{"$ref": "#/definitions/ordinate"}, {"$ref": "#/definitions/ordinate"}],
        "additionalItems": False,
        "minItems": 2,
    },
}
REGEXES = {
    "a phone number": r"\+[1-9]\d{0,2} \d{3}-\d{4}",
    "a date": r"(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    "an IPv4 address": r"((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)",
    "a colour": r"#[0-9a-fA-F]{6}|(light|dark) (red|green|blue)",
    "a version": r"v?\d{1,3}(\.\d{1,3}){2}(-(alpha|beta|rc)\.\d{1,2})?",
    "a sentence": r"[A-Z][a-z]{0,10}( [a-z]{1,10}){1,7}\.",
    "a key and a value": r"[a-z_]{1,12} = (true|false|\d{1,6}|\"[^\"\n]{0,20}\")",
    "an answer": r"(Yes|No), because [a-zäöü ,]{5,60}\.",
    "Chinese characters": "[一-龥]{2,6}",
    "hexadecimal words": r"(0x[0-9A-F]{2,4} ){0,3}0x[0-9A-F]{2,4}",
}


def _sum(text: str) -> None:
    ast.parse(text, mode="eval")


def _balanced(text: str) -> None:
    depth = 0
    for character in text:
        depth += 1 if character == "(" else -1
        assert depth >= 0
    assert depth == 0


def _table(text: str) -> None:
    assert {len(line.split(",")) for line in text.splitlines()} == {3}


def _moves(text: str) -> None:
    assert all(each.strip("KQRBN")[0] in "abcdefgh" for each in text.split())


EBNFS: list[Case] = [
    ebnf_case(
        "a sum",
        'root ::= term (" + " term){0,4}\nterm ::= number | "(" root ")"\nnumber ::= [1-9] [0-9]{0,3}',
        _sum,
    ),
    ebnf_case("brackets", 'root ::= pair{1,4}\npair ::= "(" pair{0,2} ")"', _balanced),
    ebnf_case(
        "a table", 'root ::= (line "\\n"){1,3}\nline ::= cell "," cell "," cell\ncell ::= [a-z0-9 ]{1,8}', _table
    ),
    ebnf_case("chess moves", 'root ::= move (" " move){0,5}\nmove ::= [KQRBN]? [a-h] [1-8] "+"?', _moves),
]


def text_cases() -> list[Case]:
    """Every regular expression and grammar."""
    return [*(regex_case(name, pattern) for name, pattern in REGEXES.items()), *EBNFS]
