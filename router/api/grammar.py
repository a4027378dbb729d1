"""What the output must look like: the fields of three APIs (OpenAI, SGLang, vLLM) that say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from protocol.sampling import Grammar
from router.api.fields import ApiModel, invalid
from router.api.grammar_reader import GrammarReader

_MAX_CHOICES = 2048

Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=_MAX_CHOICES)]


class StructuredOutputs(ApiModel):
    """vLLM's object; one of its fields."""

    json_schema: Any = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None

    def found(self, within: str, reader: GrammarReader) -> list[Grammar]:
        """What the object asks for."""
        return [
            *_found(reader.schema_or_json, self.json_schema, within + "json"),
            *_found(partial(reader.text, "regex"), self.regex, within + "regex"),
            *_found(reader.choice, self.choice, within + "choice"),
            *_found(partial(reader.text, "ebnf"), self.grammar, within + "grammar"),
            *([Grammar(kind="json_object", field=within + "json_object")] if self.json_object else []),
            *_found(reader.structural_tag, self.structural_tag, within + "structural_tag"),
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

    def grammars(self, reader: GrammarReader) -> list[Grammar]:
        """Everything that the fields ask for; more than one is for `grammar` to refuse."""
        nested = self.structured_outputs
        regex, ebnf = partial(reader.text, "regex"), partial(reader.text, "ebnf")
        return [
            *_found(reader.schema_or_json, self.json_schema, "json_schema"),
            *_found(regex, self.regex, "regex"),
            *_found(ebnf, self.ebnf, "ebnf"),
            *_found(reader.structural_tag, self.structural_tag, "structural_tag"),
            *_found(reader.schema_or_json, self.guided_json, "guided_json"),
            *_found(regex, self.guided_regex, "guided_regex"),
            *_found(reader.choice, self.guided_choice, "guided_choice"),
            *_found(ebnf, self.guided_grammar, "guided_grammar"),
            *([] if nested is None else nested.found("structured_outputs.", reader)),
        ]

    def grammar(self, reader: GrammarReader) -> Grammar | None:
        """What the output must match, if anything; raises `ApiError` (400)."""
        found = self.grammars(reader)
        if len(found) > 1:
            names = [grammar.field for grammar in found]
            raise invalid(names[1], f"{names[0]} constrains the output already; give one of them")
        return found[0] if found else None


def _found(read: Callable[[Any, str], Grammar], value: Any, field: str) -> list[Grammar]:
    return [] if value is None else [read(value, field)]
