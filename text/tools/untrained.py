"""Conversations with tools for chat templates that know none: everything about tools is said in plain messages.

The form of calls is that of a `CallForm`, so that the model's answers are read, and constrained, as those of any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from text.tools.families import CallForm

_RESULT, _RESULT_END = "<tool_response>\n", "\n</tool_response>"


def with_tools_described(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], form: CallForm
) -> list[dict[str, Any]]:
    """The messages with the tools in their system message, or in a new one before them."""
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = form.opening + form.before + "NAME" + form.between + "{ARGUMENTS}" + form.after + form.closing
    text = (
        f"You can call these functions, given as JSON with a schema of their parameters:\n{described}\n"
        f"To call one, answer with its name and its arguments in JSON, exactly like this:\n{example}\n"
        f"Results come back between {_RESULT.strip()} and {_RESULT_END.strip()}."
    )
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *map(dict, rest)]
    return [{"role": "system", "content": text}, *map(dict, messages)]


def with_calls_written(messages: Sequence[Mapping[str, Any]], form: CallForm) -> list[dict[str, Any]]:
    """The messages with the assistant's calls as text, and the results of tools as the user's messages."""
    result: list[dict[str, Any]] = []
    after_result = False
    for message in messages:
        written = dict(message)
        is_result = message["role"] == "tool"
        if is_result:
            written = {"role": "user", "content": _RESULT + message["content"] + _RESULT_END}
        elif calls := written.pop("tool_calls", None):
            written["content"] = "\n".join(filter(None, [message["content"], _written(calls, form)]))
        if is_result and after_result:
            result[-1]["content"] += "\n" + written["content"]
        else:
            result.append(written)
        after_result = is_result
    return result


def _written(calls: Sequence[Mapping[str, Any]], form: CallForm) -> str:
    functions = [call["function"] for call in calls]
    return (
        form.opening
        + form.separator.join(
            form.before + function["name"] + form.between + _json(function["arguments"]) + form.after
            for function in functions
        )
        + form.closing
    )


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
