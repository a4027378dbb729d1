"""What a chat's output must look like, when tools and reasoning have their say: one structural tag around it all.

Replicas compile it (see `protocol.sampling.Grammar`). Its parts are formats of xgrammar's structural tags.
"""

from __future__ import annotations

import json
from typing import Any

from protocol.sampling import Grammar
from router.api.chat_tools import FunctionTool, ToolPlan
from router.api.fields import invalid
from text.reasoning import CLOSE, OPEN, Thinking
from text.tools.families import CallForm, ToolFamily

_MAX_BYTES = 256 << 10
_ANY_OBJECT = {"type": "object"}
_NEWLINES = {"type": "regex", "pattern": "\\n{0,2}"}

Format = dict[str, Any]


def chat_grammar(
    wanted: Grammar | None, plan: ToolPlan, family: ToolFamily | None, thinking: Thinking | None
) -> Grammar | None:
    """The grammar of the whole output. `wanted` is what the request asks of the answer, `thinking` how the output
    begins where the model reasons. Raises `ApiError` (400) for what cannot be combined."""
    format_: Format
    if plan.required:
        assert family is not None, "refused before"
        format_, field = _calls(plan, family.form), "tools"
    elif plan.callable and family is not None and wanted is not None:
        # The answer is as it was asked for, or there are calls in its place.
        format_, field = {"type": "or", "elements": [_calls(plan, family.form), _answer(wanted)]}, wanted.field
    elif plan.constrained and family is not None:
        format_, field = _calls_in_text(plan, family.form), "tools"
    elif wanted is None or thinking in (None, Thinking.CLOSED):
        return wanted
    else:
        format_, field = _answer(wanted), wanted.field
    tag = {"type": "structural_tag", "format": _after_thinking(format_, thinking)}
    text = json.dumps(tag, ensure_ascii=False, separators=(",", ":"))
    if (size := len(text.encode())) > _MAX_BYTES:
        raise invalid(
            field, f"the grammar of the output has {size} bytes, over the limit of {_MAX_BYTES}; make it smaller"
        )
    return Grammar(kind="structural_tag", text=text, field=field)


def _calls(plan: ToolPlan, form: CallForm) -> Format:
    """One call, or several, and nothing else."""
    section = {
        "type": "tags_with_separator",
        "tags": [_call(tool, form, schema=tool.schema_) for tool in plan.callable],
        "separator": form.separator,
        "at_least_one": True,
        "stop_after_first": not plan.parallel,
    }
    if not form.opening:
        return section
    return {"type": "tag", "begin": form.opening, "content": section, "end": form.closing}


def _calls_in_text(plan: ToolPlan, form: CallForm) -> Format:
    """Any text; what begins like a call is one. Arguments are free where the tool is not strict."""
    tags = [_call(tool, form, schema=tool.schema_ if tool.strict else _ANY_OBJECT) for tool in plan.callable]
    if form.opening:
        section = {
            "type": "tags_with_separator",
            "tags": tags,
            "separator": form.separator,
            "at_least_one": True,
            "stop_after_first": not plan.parallel,
        }
        tags = [{"type": "tag", "begin": form.opening, "content": section, "end": form.closing}]
    return {
        "type": "triggered_tags",
        "triggers": [form.trigger],
        "tags": tags,
        "stop_after_first": not plan.parallel,
    }


def _call(tool: FunctionTool, form: CallForm, *, schema: dict[str, Any]) -> Format:
    return {
        "type": "tag",
        "begin": form.before + tool.name + form.between,
        "content": {"type": "json_schema", "json_schema": schema},
        "end": form.after,
    }


def _answer(wanted: Grammar) -> Format:
    """What a request asks for, as part of a structural tag."""
    match wanted.kind:
        case "json_schema":
            return {"type": "json_schema", "json_schema": json.loads(wanted.text)}
        case "json_object":
            return {"type": "json_schema", "json_schema": _ANY_OBJECT}
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


def _after_thinking(answer: Format, thinking: Thinking | None) -> Format:
    if thinking in (None, Thinking.CLOSED):
        return answer
    thought: Format = {
        "type": "tag",
        "begin": "" if thinking is Thinking.OPEN else OPEN,
        "content": {"type": "any_text"},
        "end": CLOSE,
    }
    if thinking is Thinking.OPEN:
        return {"type": "sequence", "elements": [thought, _NEWLINES, answer]}
    first = {"type": "optional", "content": {"type": "sequence", "elements": [thought, _NEWLINES]}}
    return {"type": "sequence", "elements": [first, answer]}
