"""The OpenAPI document of this router, made from the models that read the requests.

Fields that are refused are in it too, with the values that ask for nothing and so are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from router.api.fields import ApiModel
from router.auth import OPEN_PATHS
from router.version import VERSION

_SCHEMAS = "#/components/schemas/"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_NOTES = frozenset({"title", "description", "default"})
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_TIMEOUT = {
    "name": "X-Request-Timeout",
    "in": "header",
    "description": "Seconds within which the request must be finished",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
_LAST_EVENT = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "The id of the last event received of a stream, which then goes on after it",
    "schema": {"type": "string"},
}


class Described(Protocol):
    """An operation, as far as it is described."""

    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def methods(self) -> tuple[str, ...]: ...
    @property
    def summary(self) -> str: ...
    @property
    def request(self) -> type[ApiModel] | None: ...
    @property
    def beside(self) -> type[ApiModel] | None: ...
    @property
    def objects(self) -> Mapping[str, type[ApiModel]]: ...
    @property
    def streams(self) -> bool: ...
    @property
    def query(self) -> Mapping[str, str]: ...


def document(operations: Sequence[Described], *, title: str, with_keys: bool) -> dict[str, Any]:
    """The whole document; `with_keys` says that requests must show an API key."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        for path in operation.paths:
            shown = re.sub(r"{(\w+):\w+}", r"{\1}", path)
            for method in operation.methods:
                described = _operation(operation, shown, method, schemas)
                if with_keys and shown in OPEN_PATHS:
                    described["security"] = []
                paths.setdefault(shown, {})[method.lower()] = described
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": title, "version": VERSION},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if with_keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _operation(operation: Described, path: str, method: str, schemas: dict[str, Any]) -> dict[str, Any]:
    error = {"description": "What is wrong", "content": _json({"$ref": _SCHEMAS + "Error"})}
    content = _json({"type": "object"} if path != "/generate" else {"type": ["object", "array"]})
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    name = re.sub(r"\W+", "_", path).strip("_")
    parameters: list[dict[str, Any]] = [
        {"name": each, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for each in re.findall(r"{(\w+)}", path)
    ]
    parameters += [
        {"name": each, "in": "query", "description": words, "schema": {"type": "number", "minimum": 0}}
        for each, words in operation.query.items()
    ]
    if operation.streams:
        parameters += [_TIMEOUT, _LAST_EVENT]
    found: dict[str, Any] = {
        "operationId": f"{method.lower()}_{name}",
        "summary": operation.summary,
        "responses": {"200": {"description": "The answer", "content": content}, "default": error},
    }
    if parameters:
        found["parameters"] = parameters
    if operation.request is not None:
        body = {"$ref": _SCHEMAS + _add(operation.request, operation, schemas)}
        found["requestBody"] = {"required": True, "content": _json(body)}
    return found


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _add(model: type[ApiModel], operation: Described, schemas: dict[str, Any]) -> str:
    """Put the model's schema, and those it refers to, among the others; returns its name."""
    schema = body_schema(model, schemas)
    if operation.beside is not None:
        schemas[operation.beside.__name__] = beside = body_schema(operation.beside, schemas)
        schema["properties"] = {**beside["properties"], **schema["properties"]}
    for name, kind in operation.objects.items():
        one = {"$ref": _SCHEMAS + kind.__name__}
        schema["properties"][name] = {"anyOf": [one, {"type": "array", "items": one}, {"type": "null"}]}
    schemas[model.__name__] = schema
    return model.__name__


def body_schema(model: type[ApiModel], schemas: dict[str, Any]) -> dict[str, Any]:
    """The schema of a body read into `model`: null counts as absent, and fields that are refused may ask for nothing.

    Schemas it refers to go into `schemas`.
    """
    schema = _in_its_words(model.model_json_schema(ref_template=_SCHEMAS + "{model}"))
    for name, referred in schema.pop("$defs", {}).items():
        schemas[name] = referred
    required = set(schema.get("required", ()))
    properties = {
        name: found if name in required else _or_null(found) for name, found in schema.get("properties", {}).items()
    }
    for name, neutral in model.unsupported.items():
        words = "Not supported: these values, which ask for nothing, are accepted"
        properties[name] = {"enum": [*neutral, None], "description": words}
    for name, other in model.replaced.items():
        properties[name] = {"enum": [None], "deprecated": True, "description": f"Use {other}"}
    return {**schema, "properties": properties, "additionalProperties": False}


def _in_its_words(schema: Any) -> Any:
    """Bounds under JSON Schema's names: pydantic leaves its own where a field is prepared before it is checked."""
    if isinstance(schema, list):
        return [_in_its_words(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    bounded = schema.get("type") in ("integer", "number")
    return {_BOUNDS.get(name, name) if bounded else name: _in_its_words(value) for name, value in schema.items()}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    kinds = schema.get("anyOf")
    if kinds is not None:
        return schema if {"type": "null"} in kinds else {**schema, "anyOf": [*kinds, {"type": "null"}]}
    if not schema.keys() & {"type", "$ref", "enum", "const", "oneOf", "allOf"}:
        return schema
    notes = {name: value for name, value in schema.items() if name in _NOTES}
    kind = {name: value for name, value in schema.items() if name not in _NOTES}
    return {**notes, "anyOf": [kind, {"type": "null"}]}
