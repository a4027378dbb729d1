"""Schemas are brought into a form that grammars enforce whole, or refused by the keyword that none can."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
import xgrammar

from protocol.sampling import Grammar
from router.schema import SchemaError, enforceable
from tests.schemas.made import made_schema
from tests.schemas.written import SCHEMAS
from tests.unit.grammars import COMPILER, END, TOKENIZER, VOCAB

S: dict[str, Any] = {"type": "string"}
I: dict[str, Any] = {"type": "integer"}  # noqa: E741


def obj(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **more}


REFUSED = {
    "not": {"not": S},
    "if": {"type": "object", "if": {}, "then": {"required": ["a"]}},
    "uniqueItems": {"type": "array", "items": I, "uniqueItems": True},
    "contains": {"type": "array", "contains": I},
    "dependentRequired": obj({"a": S, "b": S}, dependentRequired={"a": ["b"]}),
    "oneOf": {"oneOf": [I, {"type": "number", "minimum": 5}]},
    "looks around": {"type": "string", "pattern": "^(?=a).*$"},
    "within": {"type": "string", "pattern": "a^b"},
    "lengths into the pattern": {"type": "string", "pattern": "^(a|bc)+$", "maxLength": 3},
    "no whole number": {"type": "number", "multipleOf": 0.5},
    "so far apart": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100_000},
    "propertyNames": obj({"long": S}, propertyNames={"maxLength": 2}),
    "matches patternProperties": obj({"xa": S}, patternProperties={"^x": I}),
    "pointer into this schema": {"$ref": "http://example.com/other"},
    "names nothing": {"$ref": "#/$defs/no"},
    "round in a circle": {"$ref": "#/$defs/a", "minLength": 1, "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "at once": {"allOf": [S, I]},
    "minLength 3 is more": {"type": "string", "minLength": 3, "maxLength": 2},
    "leave no number": {"type": "integer", "minimum": 2.5, "maximum": 2.9},
    "none of its values": {"enum": [1, "a"], "type": "boolean"},
    "none of JSON's": {"type": "text"},
    "levels deep": json.loads('{"items":' * 70 + "{}" + "}" * 70),
    "allows no value": False,
    "no valid JSON schema": {"type": "object", "properties": 5},
}
KEPT: dict[str, dict[str, Any]] = {
    "all of two": {"allOf": [obj({"a": S}, required=["a"]), obj({"b": I}, required=["b"])]},
    "all beside": obj({"x": I}, required=["x"], allOf=[obj({"a": {"maxLength": 2}}, required=["a"])]),
    "any beside": obj(
        {"x": I}, required=["x"], anyOf=[{"required": ["y"], "properties": {"y": I}}, {"required": ["z"]}]
    ),
    "one of, told apart": {"oneOf": [obj({"k": {"const": k}, "v": I}, required=["k", "v"]) for k in ("p", "q")]},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 6},
    "simple pattern with lengths": {"type": "string", "pattern": "^[a-z]+$", "minLength": 3, "maxLength": 5},
    "lengths beside a format": {"type": "string", "format": "email", "maxLength": 4},
    "required but not described": obj({"a": I}, required=["a", "zz"]),
    "reference with more beside": {
        "$defs": {"s": S},
        **obj({"a": {"$ref": "#/$defs/s", "maxLength": 2}}, required=["a"]),
    },
    "reference to the whole": obj({"v": I, "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, required=["v"]),
    "escaped pointer": {
        "$defs": {"a/b ~c": I},
        "type": "array",
        "items": {"$ref": "#/$defs/a~1b%20~0c"},
        "maxItems": 2,
    },
    "no type, lengths": {"minLength": 3, "maxLength": 4},
    "no type, bounds": {"minimum": 3, "maximum": 9},
    "multiples in bounds": {"type": "integer", "multipleOf": 7, "minimum": -20, "maximum": 40},
    "bounds with fractions": {"type": "integer", "minimum": 1.5, "exclusiveMaximum": 4},
    "values cut by the rest": {"enum": ["a", "abc", 1, 7, True, None], "type": ["string", "integer"], "maxLength": 2},
    "names": {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z]{2}$"},
        "additionalProperties": I,
        "maxProperties": 2,
    },
    "older tuple": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [I, S],
        "additionalItems": False,
    },
    "older bounds": {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "integer",
        "minimum": 3,
        "exclusiveMinimum": True,
        "maximum": 5,
    },
    "a property that cannot be": obj({"a": I, "b": False}, required=["a"]),
    "list without items": {"type": "array", "minItems": 1, "maxItems": 2},
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals_name_what_cannot_be_enforced(words: str) -> None:
    with pytest.raises(SchemaError, match="at /") as caught:
        enforceable(REFUSED[words], strict=True)
    assert words in str(caught.value)


def test_refusals_say_where() -> None:
    schema = obj({"a": {"type": "array", "items": {"$ref": "#/$defs/x"}}}, **{"$defs": {"x": {"not": {}}}})
    with pytest.raises(SchemaError, match=r"^at /\$defs/x: not cannot be enforced"):
        enforceable(schema, strict=True)


def test_what_is_not_strict_does_without() -> None:
    loose = obj({"a": {"type": "array", "items": I, "uniqueItems": True}, "b": {**S, "pattern": "(?!x)"}})
    made = enforceable(loose, strict=False)
    assert made["properties"] == {"a": {"type": "array", "items": I}, "b": S}
    assert enforceable({"oneOf": [I, {"type": "number"}]}, strict=False) == {"anyOf": [I, {"type": "number"}]}


def test_properties_keep_their_order_and_the_result_stays_as_it_is() -> None:
    for schema in (*KEPT.values(), *SCHEMAS.values(), *map(made_schema, range(60))):
        once = enforceable(schema, strict=True)
        assert enforceable(once, strict=True) == once
    made = enforceable(obj({"z": S, "a": S}, required=["a", "z"]), strict=True)
    assert list(made["properties"]) == ["z", "a"]


WALKED = {**KEPT, **SCHEMAS, **{f"made {number}": made_schema(number) for number in range(24)}}
SAYABLE = [name for name, schema in WALKED.items() if json.dumps(schema, ensure_ascii=False).isascii()]
"""Those whose texts the 97 tokens can spell."""


@pytest.mark.parametrize("name", SAYABLE)
def test_every_walk_through_the_grammar_is_valid(name: str) -> None:
    """Random ways through the grammar, which lead into corners that no model goes to."""
    schema = WALKED[name]
    validator = jsonschema.validators.validator_for(schema)(schema)
    grammar = Grammar(kind="json_schema", text=json.dumps(enforceable(schema, strict=True)))
    handle = COMPILER.compile(grammar).handle
    rng = random.Random(0)
    ended = 0
    for _ in range(12):
        text = _walk(handle, rng)
        if text is not None:
            ended += 1
            validator.validate(json.loads(text))
    assert ended


_CLOSING = {TOKENIZER.encode(character)[0] for character in '"}],:'}
_SPACE = TOKENIZER.encode(" ")[0]


def _walk(handle: Any, rng: random.Random) -> str | None:
    """A text that the grammar allows, one character at a time, or None if it got too long."""
    matcher = xgrammar.GrammarMatcher(handle)
    bits = xgrammar.allocate_token_bitmask(1, VOCAB)
    tokens: list[int] = []
    for _ in range(600):
        matcher.fill_next_token_bitmask(bits)
        allowed = np.flatnonzero(np.unpackbits(bits.numpy().view(np.uint8), bitorder="little")[:VOCAB]).tolist()
        if END in allowed and (len(allowed) == 1 or rng.random() < 0.5):
            return TOKENIZER.decode(tokens)
        allowed = [token for token in allowed if token not in (END, _SPACE)] or [_SPACE]
        closing = [token for token in allowed if token in _CLOSING]
        tokens.append(rng.choice(closing if closing and rng.random() < 0.3 else allowed))
        assert matcher.accept_token(tokens[-1])
    return None
