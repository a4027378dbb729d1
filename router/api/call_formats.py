"""Calls of tools as formats of xgrammar's structural tags, in the form of a family.

Marks that are special tokens of the model are matched by their ids: as texts they would be spelt out in other tokens,
which no model was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.api.chat_tools import FunctionTool, ToolPlan
from router.api.grammar_reader import GrammarReader
from text.tools.families import CallForm

Format = dict[str, Any]

_MAX_SPACE = 32
"""Characters of white space between two parts of JSON: without a limit, a model can go on with it for ever."""


def json_format(schema: Any) -> Format:
    """JSON that follows a schema."""
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": _MAX_SPACE}


ANY_OBJECT = json_format({"type": "object"})


class CallFormats:
    """The formats of one plan's calls; `specials` are the ids of marks that are special tokens."""

    def __init__(self, plan: ToolPlan, form: CallForm, specials: Mapping[str, int], reader: GrammarReader) -> None:
        self._reader = reader
        self._plan = plan
        self._form = form
        self._specials = specials

    def only(self) -> Format:
        """One call, or several, and nothing else, all with the arguments that their schemas want."""
        form = self._form
        section = self._section(strict=True)
        return tag(form.opening, section, form.closing, self._specials) if form.opening else section

    def in_text(self) -> Format:
        """Any text; what begins like a call is one. Arguments are free where the tool is not strict."""
        form = self._form
        if form.opening:
            tags = [tag(form.opening, self._section(strict=False), form.closing, self._specials)]
        else:
            tags = self._tags(strict=False)
        special = self._specials.get(form.trigger)
        kind, triggers, trigger = (
            ("triggered_tags", "triggers", form.trigger)
            if special is None
            else ("token_triggered_tags", "trigger_tokens", special)
        )
        return {"type": kind, triggers: [trigger], "tags": tags, "stop_after_first": not self._plan.parallel}

    def _section(self, *, strict: bool) -> Format:
        return {
            "type": "tags_with_separator",
            "tags": self._tags(strict=strict),
            "separator": self._form.separator,
            "at_least_one": True,
            "stop_after_first": not self._plan.parallel,
        }

    def _tags(self, *, strict: bool) -> list[Format]:
        return [self._call(each, strict=strict or bool(each.strict)) for each in self._plan.callable]

    def _call(self, tool: FunctionTool, *, strict: bool) -> Format:
        arguments = ANY_OBJECT
        if strict:
            field = f"tools[{self._plan.given.index(tool)}].function.parameters"
            arguments = json_format(self._reader.enforced(tool.schema_, field, strict=bool(tool.strict)))
        form = self._form
        return tag(form.before + tool.name + form.between, arguments, form.after, self._specials)


def tag(begin: str, content: Format, end: str, specials: Mapping[str, int]) -> Format:
    """`begin`, the content and `end`, with the special tokens that are in them."""
    first, *more = _parts(begin, specials) or [""]
    ends = _parts(end, specials)
    last = ends.pop() if len(ends) == 1 else ""
    inner = [*map(_constant, more), content, *map(_constant, ends)]
    whole = {"type": "sequence", "elements": inner} if len(inner) > 1 else content
    return {"type": "tag", "begin": first, "content": whole, "end": last}


def _parts(text: str, specials: Mapping[str, int]) -> list[str | Format]:
    """`text` as texts and special tokens."""
    found = [(place, mark) for mark in specials if (place := text.find(mark)) >= 0]
    if not found:
        return [text] if text else []
    place, mark = min(found)
    before: list[str | Format] = [text[:place]] if place else []
    return [*before, {"type": "token", "token": specials[mark]}, *_parts(text[place + len(mark) :], specials)]


def _constant(part: str | Format) -> Format:
    return {"type": "const_string", "value": part} if isinstance(part, str) else part
