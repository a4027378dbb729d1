"""Schemas written to keep the router busy, or to break it, are refused like any other that cannot be enforced."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from router.api.grammar import GrammarFields
from router.api.grammar_reader import GrammarReader
from router.errors import ApiError
from router.schema import SchemaError, enforceable

pytestmark = pytest.mark.timeout(20)

SLOW = "^(a+)+$"
LONG = "a" * 60 + "!"
ITSELF = {"$defs": {"a": {"$ref": "#/$defs/a"}}}
AROUND = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}}
ONE = [{"$ref": "#/$defs/a"}, {"type": "string"}]


def nested(levels: int, key: str, wrap: Any = lambda inner: inner) -> Any:
    schema: Any = {"type": "object"}
    for _ in range(levels):
        schema = {key: wrap(schema)}
    return schema


def doubling(levels: int) -> dict[str, Any]:
    """Each definition has the next one twice, each time with a keyword beside the reference."""
    definitions: dict[str, Any] = {
        f"a{level}": {
            "properties": {
                name: {"$ref": f"#/$defs/a{level + 1}", "minProperties": 1, "type": "object"} for name in "xy"
            }
        }
        for level in range(levels)
    }
    definitions[f"a{levels}"] = {"type": "object"}
    return {"$defs": definitions, "$ref": "#/$defs/a0", "type": "object"}


def joined(levels: int) -> dict[str, Any]:
    """Two lists of `allOf`, each of which has both of the next level."""
    definitions: dict[str, Any] = {f"{side}{levels}": {"type": "object"} for side in "ab"}
    for level in range(levels):
        for sides in ("ab", "ba"):
            definitions[f"{sides[0]}{level}"] = {"allOf": [{"$ref": f"#/$defs/{side}{level + 1}"} for side in sides]}
    return {"$defs": definitions, "$ref": "#/$defs/a0"}


def side_by_side(count: int) -> dict[str, Any]:
    values = {"e": {"enum": list(range(count))}}
    names = [f"p{number}" for number in range(count)]
    return {"$defs": values, "properties": {name: {"$ref": "#/$defs/e", "type": "integer"} for name in names}}


def repeated(schema: dict[str, Any]) -> dict[str, Any]:
    """Two equal definitions, each put into one schema many times."""
    copies = {"a": schema, "b": json.loads(json.dumps(schema))}
    return {"$defs": copies, "allOf": [{"$ref": f"#/$defs/{name}"} for name in "ab" * 1_500]}


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "names itself": ({**ITSELF, "$ref": "#/$defs/a"}, "in a circle"),
    "names itself in oneOf": ({**ITSELF, "oneOf": ONE}, "in a circle"),
    "name each other": ({**AROUND, "oneOf": ONE}, "in a circle"),
    "a property names itself": ({**ITSELF, "properties": {"p": {"$ref": "#/$defs/a"}}}, "in a circle"),
    "names the whole, with more beside": ({"$ref": "#", "type": "object"}, "in a circle"),
    "slow pattern, values": ({"enum": [LONG], "pattern": SLOW}, "leave it out"),
    "slow pattern, one value": ({"const": LONG, "pattern": SLOW}, "leave it out"),
    "slow pattern, properties": (
        {"type": "object", "properties": {LONG: {}}, "patternProperties": {SLOW: {}}},
        "patternProperties",
    ),
    "slow pattern, required": (
        {"type": "object", "required": [LONG], "patternProperties": {SLOW: {}}},
        "patternProperties",
    ),
    "doubling": (doubling(60), "too large once its references are put in"),
    "joined": (joined(40), "too large once its references are put in"),
    "values side by side": (side_by_side(5_000), "too large once its references are put in"),
    "one long list, over and over": (repeated({"required": [f"a{number}" for number in range(9_000)]}), "too large"),
    "equal items, over and over": (repeated({"items": {"enum": list(range(20_000))}}), "too large"),
    "values in two lists": (
        {"allOf": [{"enum": list(range(40_000))}, {"enum": list(range(-40_000, 0))}]},
        "none of its values",
    ),
    "lists of values apart": (
        {"oneOf": [{"enum": list(range(30_000))}, {"enum": list(range(29_999, 60_000))}]},
        "may match at once",
    ),
    "many lists of values apart": (
        {"oneOf": [{"enum": [f"{branch} {number}" for number in range(50)]} for branch in range(400)]},
        "too large",
    ),
    "multiples of zero": ({"enum": [1], "multipleOf": 0}, "reckon"),
    "no bound": ({"type": "integer", "minimum": math.inf}, "reckon"),
    "multiples of no bound": ({"type": "number", "multipleOf": math.inf}, "reckon"),
    "two deep chains": ({"allOf": [nested(400, "items"), nested(400, "items")]}, "too deep"),
    "deep allOf": ({"allOf": [nested(300, "allOf", lambda inner: [inner])] * 2}, "deep"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused(name: str) -> None:
    schema, words = HOSTILE[name]
    with pytest.raises(SchemaError) as caught:
        enforceable(schema, strict=True)
    assert words in str(caught.value)


def test_slow_patterns_are_left_out_where_it_is_not_strict() -> None:
    assert enforceable({"enum": [LONG], "pattern": SLOW}, strict=False) == {"enum": [LONG]}
    made = enforceable({"properties": {LONG: {}}, "patternProperties": {SLOW: {}}}, strict=False)
    assert made == {"type": "object", "properties": {LONG: {}}}


def test_patterns_that_read_a_text_once_are_tried() -> None:
    assert enforceable({"enum": ["ab", "a1"], "pattern": "^[a-z]+$"}, strict=True) == {"enum": ["ab"]}
    beside = {"type": "object", "properties": {"a": {"type": "null"}}, "patternProperties": {"^x-": {"type": "null"}}}
    assert enforceable(beside, strict=True) == beside


def test_a_class_left_open_is_read_once() -> None:
    pattern = "[" * 200_000
    assert enforceable({"pattern": pattern}, strict=True) == {"type": "string", "pattern": pattern}


def test_a_list_that_goes_on_through_a_property_is_no_circle() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/also"}}}
    made = enforceable({"$defs": {"node": node, "also": {"$ref": "#/$defs/node"}}, "$ref": "#/$defs/node"}, strict=True)
    assert made["$defs"]["d0"]["properties"] == {"next": {"$ref": "#/$defs/d1"}}


def deep_tag(levels: int) -> dict[str, Any]:
    tag: dict[str, Any] = {"type": "any_text"}
    for _ in range(levels):
        tag = {"type": "sequence", "elements": [tag]}
    return {"type": "structural_tag", "format": tag}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("json_schema", '{"title":"\\ud800"}'),
        ("json_schema", '{"type":"number","minimum":1e999}'),
        ("json_schema", '{"type":"number","multipleOf":1e999}'),
        ("json_schema", '{"minimum":Infinity}'),
        ("json_schema", '{"minimum":NaN}'),
        ("json_schema", {"minimum": math.nan}),
        ("json_schema", {"title": "\ud800"}),
        ("json_schema", nested(5_000, "items")),
        ("json_schema", json.dumps({"enum": [1], "multipleOf": 0})),
        ("guided_json", {"$ref": "#", "type": "object"}),
        ("structural_tag", '{"begin":"\\ud800"}'),
        ("structural_tag", deep_tag(350)),
        ("structural_tag", deep_tag(700)),
    ],
)
def test_a_request_with_it_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(ApiError) as caught:
        GrammarFields.model_construct(**{field: value}).grammar(GrammarReader())
    assert (caught.value.status, caught.value.param) == (400, field)


def test_schemas_are_found_in_every_format_that_holds_one() -> None:
    unenforceable = {"uniqueItems": True}
    for holds in ({"type": "json_schema"}, {"type": "qwen_xml_parameter"}):
        within = {"type": "sequence", "elements": [holds | {"json_schema": unenforceable}]}
        tag = {"type": "structural_tag", "format": within}
        with pytest.raises(ApiError, match="uniqueItems") as caught:
            GrammarReader().structural_tag(tag, "structural_tag")
        assert caught.value.param == "structural_tag.format.elements[0].json_schema"


def test_a_schema_of_its_own_size_is_not_too_large() -> None:
    schema = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(5_000)}}
    assert len(json.loads(GrammarReader().schema(schema, "json_schema").text)["properties"]) == 5_000
    values = {"enum": [f"value {number}" for number in range(10_000)]}
    assert json.loads(GrammarReader().schema(values, "json_schema").text) == values


def test_limits_are_the_routers_own() -> None:
    small = GrammarReader(max_bytes=100, max_parts=3)
    with pytest.raises(ApiError, match="regex: it has 101 bytes, more than the 100"):
        small.text("regex", "a" * 101, "regex")
    assert small.text("regex", "a" * 100, "regex").text == "a" * 100
    schema = {"anyOf": [{"type": "null"}, {"type": "string"}, {"type": "integer"}]}
    with pytest.raises(ApiError, match=r"too large once its references are put in \(3 parts"):
        small.schema(schema, "json_schema")
    assert small.schema({"anyOf": schema["anyOf"][:2]}, "json_schema").text
