"""One grammar, and how to tell whether an output matches it without the code under test."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema

from protocol.sampling import Grammar
from router.api.grammar_reader import GrammarReader


@dataclass(frozen=True)
class Case:
    """`check` raises for a complete output that is wrong."""

    name: str
    grammar: Grammar
    prompt: str
    check: Callable[[str], object]


def schema_case(name: str, schema: dict[str, Any]) -> Case:
    """A JSON schema as clients send it, taken the way of every request."""
    validator = jsonschema.validators.validator_for(schema)(schema)
    return Case(
        name=name,
        grammar=GrammarReader().schema(schema, "json_schema"),
        prompt=f"A short example of {schema.get('title', name)} as compact JSON:\n",
        check=lambda text: validator.validate(json.loads(text)),
    )


def regex_case(name: str, pattern: str) -> Case:
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text), f"{text!r} does not match {pattern!r}"

    return Case(name, Grammar(kind="regex", text=pattern, field="regex"), f"A text like {name}: ", check)


def ebnf_case(name: str, grammar: str, check: Callable[[str], object]) -> Case:
    return Case(name, Grammar(kind="ebnf", text=grammar, field="ebnf"), f"A text like {name}: ", check)
