"""What a chat's output must look like, when tools and reasoning have their say: one structural tag around it all.

Replicas compile it (see `protocol.sampling.Grammar`). Its parts are formats of xgrammar's structural tags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from protocol.sampling import Grammar
from router.api.call_formats import ANY_OBJECT, CallFormats, Format, json_format, tag
from router.api.chat_tools import ToolPlan
from router.api.fields import invalid
from router.api.grammar_reader import GrammarReader, written
from text.reasoning import CLOSE, OPEN, Thinking
from text.tools.families import ToolFamily

_ANY_TEXT: Format = {"type": "any_text"}
_NEWLINES: Format = {"type": "regex", "pattern": "\\n{0,2}"}


def chat_grammar(
    wanted: Grammar | None,
    plan: ToolPlan,
    family: ToolFamily | None,
    thinking: Thinking | None,
    specials: Mapping[str, int],
    reader: GrammarReader,
) -> Grammar | None:
    """The grammar of the whole output. `wanted` is what the request asks of the answer, `thinking` how the output
    begins where the model reasons, `specials` are the marks that are special tokens. Raises `ApiError` (400) for what
    cannot be combined."""
    calls = CallFormats(plan, family.form, specials, reader) if family is not None and plan.callable else None
    if calls is not None and plan.required:
        format_, field = calls.only(), "tools"
    elif calls is not None and wanted is not None:
        # The answer is as it was asked for, or there are calls in its place.
        format_, field = {"type": "or", "elements": [calls.only(), _answer(wanted)]}, wanted.field
    elif calls is not None and plan.constrained:
        format_, field = calls.in_text(), "tools"
    elif wanted is None or thinking in (None, Thinking.CLOSED):
        return wanted
    else:
        format_, field = _answer(wanted), wanted.field
    structure = {"type": "structural_tag", "format": _after_thinking(format_, thinking, specials)}
    return reader.bounded("structural_tag", written(structure), field)


def _answer(wanted: Grammar) -> Format:
    """What a request asks for, as part of a structural tag."""
    match wanted.kind:
        case "json_schema":
            return json_format(json.loads(wanted.text))
        case "json_object":
            return ANY_OBJECT
        case "regex":
            return {"type": "regex", "pattern": wanted.text}
        case "ebnf":
            return {"type": "grammar", "grammar": wanted.text}
        case "choice":
            choices = [{"type": "const_string", "value": choice} for choice in json.loads(wanted.text)]
            return {"type": "or", "elements": choices}
    format_ = json.loads(wanted.text).get("format")
    if not isinstance(format_, dict):
        raise invalid(
            wanted.field, "beside tools or reasoning, a structural tag needs its newer form; give it a format"
        )
    return format_


def _after_thinking(answer: Format, thinking: Thinking | None, specials: Mapping[str, int]) -> Format:
    if thinking in (None, Thinking.CLOSED):
        return answer
    opened = thinking is Thinking.OPEN
    thought = tag("" if opened else OPEN, _ANY_TEXT, CLOSE, specials)
    if opened:
        return {"type": "sequence", "elements": [thought, _NEWLINES, answer]}
    first = {"type": "optional", "content": {"type": "sequence", "elements": [thought, _NEWLINES]}}
    return {"type": "sequence", "elements": [first, answer]}
