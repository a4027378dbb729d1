"""The OpenAPI document and the parsers agree: every operation exists, every field is read, every bound holds.

The document's own words are tried on the router: for each field a value that it allows, and values that it does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from router_harness import RouterHarness, running_router

from router.openapi import document
from router.routes import OPERATIONS

DOCUMENT = json.loads(json.dumps(document(OPERATIONS, title="tiny", with_keys=False)))
SCHEMAS = DOCUMENT["components"]["schemas"]
BODIES = {
    path: operation["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    for path, operation in DOCUMENT["paths"].items()
    if "requestBody" in operation.get("post", {})
}
LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/generate": {"text": "hi", "max_new_tokens": 1},
    "/tokenize": {"prompt": "hi"},
    "/v1/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5]},
    "/v1/detokenize": {"tokens": [5]},
    "/abort_request": {"rid": "x"},
}
"""A body for each operation that has one."""
FITTING: dict[str, Any] = {
    "model": "tiny",
    "text": "hi",
    "input_ids": [5],
    "sampling_params": {"temperature": 0.5},
    "messages": [{"role": "user", "content": "hi"}],
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "auto",
    "stop": ["x"],
    "json_schema": {"type": "string"},
    "guided_json": {"type": "string"},
    "structured_outputs": {"regex": "a+"},
    "structural_tag": {"structures": [], "triggers": []},
    "ebnf": 'root ::= "a"',
    "guided_grammar": 'root ::= "a"',
    "min_tokens": 1,
    "min_new_tokens": 1,
}
"""Values of fields about which the schema does not say all there is to say."""
BESIDE: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "input_ids": {"text": None},
    "prompt/messages": {"prompt": None},
    "messages/tokenize": {"prompt": None},
}


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterHarness]:
    async with running_router(tmp_path) as harness:
        await harness.pair(automatic=True)
        yield harness


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return _resolved(SCHEMAS[schema["$ref"].rpartition("/")[2]])
    return schema


def _members(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """What a value may be, each by itself, without null."""
    schema = _resolved(schema)
    if "anyOf" in schema:
        return [member for each in schema["anyOf"] for member in _members(each)]
    return [] if schema.get("type") == "null" else [schema]


async def _error(router: RouterHarness, path: str, fields: dict[str, Any]) -> Any:
    """What is wrong with the least body and these fields; None when nothing is."""
    body = {**LEAST[path], **fields}
    call = await router.post(path, {name: value for name, value in body.items() if value is not None}).done()
    return None if call.status == 200 else (call.status, call.json["error"])


def _fitting(field: str, schema: dict[str, Any]) -> Iterator[Any]:
    """Values that the schema allows, its bounds among them."""
    if field in FITTING:
        yield FITTING[field]
        return
    for member in _members(schema):
        kind = member.get("type")
        if "enum" in member:
            yield from (each for each in member["enum"] if each is not None)
        elif "const" in member:
            yield member["const"]
        elif kind == "boolean":
            yield from (True, False)
        elif kind in ("integer", "number"):
            yield member.get("minimum", member.get("exclusiveMinimum", 0) + (0.5 if kind == "number" else 1))
            if "maximum" in member and member["maximum"] <= 20:
                yield member["maximum"]
        elif kind == "string":
            yield "x" * max(1, member.get("minLength", 0))
        elif kind == "array":
            yield [next(_fitting("", member["items"])) for _ in range(max(1, member.get("minItems", 0)))]
        elif kind == "object":
            yield {}


def _unfitting(schema: dict[str, Any]) -> Iterator[Any]:
    """Values that the schema does not allow."""
    members = _members(schema)
    kinds = {member.get("type") for member in members}
    if not kinds or kinds == {None}:
        yield from ([{"no": "such"}] if members and all("enum" in member for member in members) else [])
        return
    for kind, value in (("string", "x"), ("boolean", True), ("array", ["x", {}]), ("object", {"no": 1})):
        if kind not in kinds and not (kind == "array" and "string" in kinds):
            yield value
    for member in members if len(members) == 1 else []:
        if "minimum" in member:
            yield member["minimum"] - 1
        if "exclusiveMinimum" in member:
            yield member["exclusiveMinimum"]
        if "maximum" in member:
            yield member["maximum"] + 1
        if member.get("minLength"):
            yield ""
        if "exclusiveMaximum" in member:
            yield member["exclusiveMaximum"]
        if "maxLength" in member:
            yield "x" * (member["maxLength"] + 1)
        if member.get("minItems"):
            yield []


@pytest.mark.parametrize("path", BODIES)
async def test_fields_are_read_as_they_are_described(router: RouterHarness, path: str) -> None:
    wrong = []
    for field, schema in SCHEMAS[BODIES[path]]["properties"].items():
        beside = dict(BESIDE.get(field, {}))
        if path.endswith("/tokenize") and field in CONVERSATION:
            beside = {"prompt": None, "messages": FITTING["messages"]}
        values = list(_fitting(field, schema))
        if not values and not any(words in schema.get("description", "") for words in ("Not supported", "Use ")):
            wrong.append((field, "is not described", schema))
        for value in values:
            error = await _error(router, path, {**beside, field: value})
            if error is not None and error[1]["code"] not in ALLOWED_REFUSALS.get(field, ()):
                wrong.append((field, "should be", value, error))
        for value in _unfitting(schema):
            error = await _error(router, path, {**beside, field: value})
            named = "" if error is None else re.split(r"[.\[]", error[1]["param"] or "")[0]
            if error is None or error[0] != 400 or named != field:
                wrong.append((field, "should not be", value, error))
    assert not wrong, "\n".join(map(str, wrong))


CONVERSATION = {
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "reasoning_effort",
    "tools",
}
ALLOWED_REFUSALS: dict[str, tuple[str, ...]] = {
    "chat_template": ("unsupported_parameter",),  # the configuration says who may bring one
    "continue_final_message": ("invalid_value",),  # of an assistant only
    "reasoning_effort": ("invalid_value",),  # where the model knows of none
    "documents": ("invalid_value",),  # likewise
    "echo": ("invalid_value",),  # of a message that is continued only
}


@pytest.mark.parametrize("path", BODIES)
async def test_what_is_not_described_is_refused(router: RouterHarness, path: str) -> None:
    schema = SCHEMAS[BODIES[path]]
    assert schema["additionalProperties"] is False
    error = await _error(router, path, {"no_such_field": 1})
    assert error[1]["code"] == "unknown_parameter"
    for name in schema.get("required", ()):
        least = {field: None for field in LEAST[path] if field == name}
        assert (await _error(router, path, least))[1]["param"] == name


async def test_nested_parameters_are_read_as_they_are_described(router: RouterHarness) -> None:
    for field, schema in SCHEMAS["NativeSampling"]["properties"].items():
        for value in _fitting(field, schema):
            error = await _error(router, "/generate", {"sampling_params": {"max_new_tokens": 1, field: value}})
            assert error is None, (field, value, error)
        for value in _unfitting(schema):
            error = await _error(router, "/generate", {"sampling_params": {field: value}})
            assert error is not None, (field, value)
            assert error[0] == 400, (field, value, error)


def test_every_model_field_is_described() -> None:
    for operation in OPERATIONS:
        if operation.request is None:
            continue
        models = [operation.request, *([operation.beside] if operation.beside is not None else [])]
        known = {name for model in models for name in (*model.model_fields, *model.unsupported, *model.replaced)}
        assert set(SCHEMAS[operation.request.__name__]["properties"]) == known


async def test_every_operation_answers_as_described(router: RouterHarness) -> None:
    served = (await router.get("/openapi.json").done()).json
    assert served["paths"].keys() == DOCUMENT["paths"].keys()
    for path, operations in DOCUMENT["paths"].items():
        for method in operations:
            url = path.replace("{model}", "tiny").replace("{id}", "nothing")
            if method == "post":
                call = await router.post(url, LEAST.get(path, {})).done()
            else:
                call = await router.get(url).done()
            assert call.status == (404 if "{id}" in path else 200), (method, path, call.body)
            other = "PUT"
            assert (await router.request(other, url).done()).status == 405


def test_schemas_use_the_words_of_json_schema() -> None:
    """A word that is none of these would bound nothing."""
    for name, schema in SCHEMAS.items():
        for found in _schemas_in(schema):
            assert found.keys() <= WORDS, (name, found.keys() - WORDS)


def _schemas_in(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for inner in schema.get("properties", {}).values():
        yield from _schemas_in(inner)
    for word in ("anyOf", "oneOf", "allOf"):
        for inner in schema.get(word, ()):
            yield from _schemas_in(inner)
    for word in ("items", "additionalProperties"):
        if isinstance(schema.get(word), dict):
            yield from _schemas_in(schema[word])


WORDS = {
    *("$ref", "title", "description", "default", "deprecated", "type", "enum", "const", "anyOf", "oneOf", "allOf"),
    *("properties", "required", "items", "additionalProperties", "pattern", "discriminator"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems"),
    *("minProperties", "maxProperties"),
}


def test_every_reference_leads_somewhere() -> None:
    for reference in re.findall(r'"\$ref": "([^"]+)"', json.dumps(DOCUMENT)):
        assert reference.rpartition("/")[2] in SCHEMAS
    names = [each["operationId"] for path in DOCUMENT["paths"].values() for each in path.values()]
    assert len(names) == len(set(names))
