"""Grammars as requests write them, read into `Grammar`; every method raises `ApiError` (400) naming the field.

Only what can be seen without compiling is checked here; replicas compile, and their refusals name the same field.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from protocol.sampling import Grammar, GrammarKind
from router.api.fields import invalid, shown
from router.config import RouterConfig
from router.schema import MOST_PARTS, SchemaError, enforceable

_WITH_SCHEMA = ("json_schema", "qwen_xml_parameter")
"""Formats of structural tags that hold a schema."""
_MAX_WORDS = 300
"""Characters of what is said about a schema, which can quote it."""


@dataclass(frozen=True, kw_only=True)
class GrammarReader:
    """Reads within limits: bytes of one grammar, and parts of a JSON schema with its references put in."""

    max_bytes: int = 256 << 10
    max_parts: int = MOST_PARTS

    @classmethod
    def of(cls, config: RouterConfig) -> GrammarReader:
        """With the limits that the router was given."""
        return cls(max_bytes=config.max_grammar_bytes, max_parts=config.max_schema_parts)

    def text(self, kind: GrammarKind, value: str, field: str) -> Grammar:
        """A regex, or EBNF."""
        if not value:
            raise invalid(field, "it is empty; leave it out, or say what the output must match")
        return self.bounded(kind, value, field)

    def choice(self, values: list[str], field: str) -> Grammar:
        """One of these texts."""
        return self.bounded("choice", written(values), field)

    def schema_or_json(self, value: Any, field: str) -> Grammar:
        """A JSON schema, or its JSON in a string."""
        return self.schema(_parsed(value, field), field)

    def schema(self, schema: Any, field: str, *, strict: bool = True) -> Grammar:
        """A JSON schema."""
        if not isinstance(schema, dict | bool):
            raise invalid(field, f"{shown(schema)} is no JSON schema; give an object")
        return self.bounded("json_schema", written(self.enforced(schema, field, strict=strict)), field)

    def enforced(self, schema: Any, field: str, *, strict: bool = True) -> Any:
        """The schema as a grammar enforces it.

        What no grammar can enforce is refused if `strict`, else left out.
        """
        try:
            self.bounded("json_schema", written(schema), field)
        except (ValueError, RecursionError) as error:
            raise invalid(field, f"it cannot be written as JSON: {error}; change it") from error
        try:
            return enforceable(schema, strict=strict, max_parts=self.max_parts)
        except SchemaError as error:
            raise invalid(field, str(error)[:_MAX_WORDS]) from error

    def structural_tag(self, value: Any, field: str) -> Grammar:
        """A structural tag, or its JSON in a string."""
        tag = _parsed(value, field)
        if not isinstance(tag, dict):
            raise invalid(field, f"{shown(tag)} is no structural tag; give an object")
        try:
            text = written(self._enforced_within(tag, field))
        except RecursionError as error:
            raise invalid(field, "it is nested too deep; make it flatter") from error
        return self.bounded("structural_tag", text, field)

    def response_format(self, value: Any) -> list[Grammar]:
        """OpenAI's `response_format`, with SGLang's structural tags."""
        if value is None:
            return []
        kind = value.get("type") if isinstance(value, dict) else None
        if kind == "text":
            return []
        if kind == "json_object":
            return [Grammar(kind="json_object", field="response_format")]
        if kind == "structural_tag":
            return [self.structural_tag(value, "response_format")]
        if kind != "json_schema":
            known = "text, json_object, json_schema and structural_tag"
            raise invalid("response_format", f"{shown(value)} has no type that is known here; those are {known}")
        field = "response_format.json_schema"
        described = value.get("json_schema")
        if not isinstance(described, dict) or "schema" not in described:
            raise invalid(field, f"{shown(described)} has no schema; give an object with name and schema")
        strict = described.get("strict")
        if not isinstance(strict, bool | None):
            raise invalid(field + ".strict", f"{shown(strict)} is not true or false")
        return [self.schema(described["schema"], field + ".schema", strict=bool(strict))]

    def bounded(self, kind: GrammarKind, text: str, field: str) -> Grammar:
        """The grammar, if it is not too large."""
        size = len(text.encode())
        if size > self.max_bytes:
            raise invalid(
                field, f"it has {size} bytes, more than the {self.max_bytes} that are allowed; make it smaller"
            )
        return Grammar(kind=kind, text=text, field=field)

    def _enforced_within(self, part: Any, field: str) -> Any:
        """A structural tag with every schema in it as a grammar enforces it."""
        if isinstance(part, list):
            return [self._enforced_within(each, f"{field}[{index}]") for index, each in enumerate(part)]
        if not isinstance(part, dict):
            return part
        holds = "json_schema" if part.get("type") in _WITH_SCHEMA else "schema" if "begin" in part else ""
        return {
            key: self.enforced(value, f"{field}.{key}")
            if key == holds
            else self._enforced_within(value, f"{field}.{key}")
            for key, value in part.items()
        }


def written(value: Any) -> str:
    """As JSON. Properties keep their order: it is the order in which they are generated."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _parsed(value: Any, field: str) -> Any:
    """SGLang's clients send JSON within JSON."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (ValueError, RecursionError) as error:
        raise invalid(field, f"{shown(value)} is not valid JSON: {error}") from error
