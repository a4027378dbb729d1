"""What the output must look like: the fields of three APIs (OpenAI, SGLang, vLLM) that say so, read into one `Grammar`.

Only what can be seen without compiling is checked here; replicas compile, and their refusals name the same field.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from protocol.sampling import Grammar, GrammarKind
from router.api.fields import ApiModel, invalid, shown
from router.schema import SchemaError, enforceable

_MAX_BYTES = 256 << 10
_MAX_CHOICES = 2048
_MAX_WORDS = 300
"""Characters of what is said about a schema, which can quote it."""

Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=_MAX_CHOICES)]


class StructuredOutputs(ApiModel):
    """vLLM's object; one of its fields."""

    json_schema: Any = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None

    def found(self, within: str) -> list[Grammar]:
        """What the object asks for."""
        return [
            *_schema(self.json_schema, within + "json"),
            *_text("regex", self.regex, within + "regex"),
            *_choice(self.choice, within + "choice"),
            *_text("ebnf", self.grammar, within + "grammar"),
            *([Grammar(kind="json_object", field=within + "json_object")] if self.json_object else []),
            *_structural_tag(self.structural_tag, within + "structural_tag"),
        ]


class GrammarFields(ApiModel):
    """SGLang's names, and vLLM's as aliases. A request may use one of them."""

    json_schema: Any = None
    """A JSON schema, or its JSON in a string."""
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: Any = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: Literal["auto", "xgrammar"] = "auto"
    structured_outputs: StructuredOutputs | None = None

    def grammars(self) -> list[Grammar]:
        """Everything that the fields ask for; more than one is for `grammar` to refuse."""
        nested = self.structured_outputs
        return [
            *_schema(self.json_schema, "json_schema"),
            *_text("regex", self.regex, "regex"),
            *_text("ebnf", self.ebnf, "ebnf"),
            *_structural_tag(self.structural_tag, "structural_tag"),
            *_schema(self.guided_json, "guided_json"),
            *_text("regex", self.guided_regex, "guided_regex"),
            *_choice(self.guided_choice, "guided_choice"),
            *_text("ebnf", self.guided_grammar, "guided_grammar"),
            *([] if nested is None else nested.found("structured_outputs.")),
        ]

    def grammar(self) -> Grammar | None:
        """What the output must match, if anything; raises `ApiError` (400)."""
        found = self.grammars()
        if len(found) > 1:
            names = [grammar.field for grammar in found]
            raise invalid(names[1], f"{names[0]} constrains the output already; give one of them")
        return found[0] if found else None


def schema_grammar(schema: Any, *, field: str, strict: bool = True) -> Grammar:
    """The grammar of a JSON schema; raises `ApiError` (400) naming `field`."""
    if not isinstance(schema, dict | bool):
        raise invalid(field, f"{shown(schema)} is no JSON schema; give an object")
    return _bounded("json_schema", _json(enforced(schema, field=field, strict=strict)), field)


def enforced(schema: Any, *, field: str, strict: bool = True) -> Any:
    """The schema as a grammar enforces it; raises `ApiError` (400) naming `field`.

    What no grammar can enforce is refused if `strict`, else left out.
    """
    try:
        _bounded("json_schema", _json(schema), field)
    except (ValueError, RecursionError) as error:
        raise invalid(field, f"it cannot be written as JSON: {error}; change it") from error
    try:
        return enforceable(schema, strict=strict)
    except SchemaError as error:
        raise invalid(field, str(error)[:_MAX_WORDS]) from error


def response_format_grammars(value: Any) -> list[Grammar]:
    """OpenAI's `response_format`, with SGLang's structural tags; raises `ApiError` (400)."""
    if value is None:
        return []
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return []
    if kind == "json_object":
        return [Grammar(kind="json_object", field="response_format")]
    if kind == "structural_tag":
        return _structural_tag(value, "response_format")
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
    return [schema_grammar(described["schema"], field=field + ".schema", strict=bool(strict))]


def _schema(value: Any, field: str) -> list[Grammar]:
    return [] if value is None else [schema_grammar(_parsed(value, field), field=field)]


def _structural_tag(value: Any, field: str) -> list[Grammar]:
    if value is None:
        return []
    tag = _parsed(value, field)
    if not isinstance(tag, dict):
        raise invalid(field, f"{shown(tag)} is no structural tag; give an object")
    try:
        text = _json(_enforced_within(tag, field))
    except RecursionError as error:
        raise invalid(field, "it is nested too deep; make it flatter") from error
    return [_bounded("structural_tag", text, field)]


def _enforced_within(part: Any, field: str) -> Any:
    """A structural tag with every schema in it as a grammar enforces it."""
    if isinstance(part, list):
        return [_enforced_within(each, f"{field}[{index}]") for index, each in enumerate(part)]
    if not isinstance(part, dict):
        return part
    holds = "json_schema" if part.get("type") == "json_schema" else "schema" if "begin" in part else ""
    return {
        key: enforced(value, field=f"{field}.{key}") if key == holds else _enforced_within(value, f"{field}.{key}")
        for key, value in part.items()
    }


def _choice(value: list[str] | None, field: str) -> list[Grammar]:
    return [] if value is None else [_bounded("choice", _json(value), field)]


def _text(kind: GrammarKind, value: str | None, field: str) -> list[Grammar]:
    if value is None:
        return []
    if not value:
        raise invalid(field, "it is empty; leave it out, or say what the output must match")
    return [_bounded(kind, value, field)]


def _bounded(kind: GrammarKind, text: str, field: str) -> Grammar:
    size = len(text.encode())
    if size > _MAX_BYTES:
        raise invalid(field, f"it has {size} bytes, more than the {_MAX_BYTES} that are allowed; make it smaller")
    return Grammar(kind=kind, text=text, field=field)


def _parsed(value: Any, field: str) -> Any:
    """SGLang's clients send JSON within JSON."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (ValueError, RecursionError) as error:
        raise invalid(field, f"{shown(value)} is not valid JSON: {error}") from error


def _json(value: Any) -> str:
    """Properties keep their order: it is the order in which they are generated."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
