"""The families of formats in which models call tools, and which of them a chat template speaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from text.tools import deepseek, hermes, llama3, mistral, pythonic
from text.tools.parser import Read

ToolParserName = Literal["auto", "hermes", "llama3", "mistral", "deepseek", "pythonic", "none"]


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """How calls are written, for grammars and for models that are told in words.

    `opening`, calls with `separator` between them, `closing`; a call is `before`, its name, `between`, its arguments as
    a JSON object, `after`. Output is free until it reaches `trigger`, with which every call or else the opening begins.
    """

    before: str
    between: str
    after: str
    trigger: str
    separator: str = ""
    opening: str = ""
    closing: str = ""


@dataclass(frozen=True, kw_only=True)
class ToolFamily:
    """One family's way to call tools."""

    name: str
    read: Read
    form: CallForm
    markers: tuple[str, ...]
    """What its calls are recognised by; where these are special tokens, they must be part of the text."""
    short_ids: bool = False
    """Its templates want the ids of calls to be nine letters and digits."""


HERMES = ToolFamily(
    name="hermes",
    read=hermes.read,
    form=CallForm(
        before='<tool_call>\n{"name": "',
        between='", "arguments": ',
        after="}\n</tool_call>",
        trigger=hermes.BEGIN,
        separator="\n",
    ),
    markers=(hermes.BEGIN, hermes.END),
)
_OBJECTS = CallForm(before='{"name": "', between='", "parameters": ', after="}", trigger='{"name": ', separator="; ")
LLAMA3 = ToolFamily(name="llama3", read=llama3.read, form=_OBJECTS, markers=(llama3.PYTHON_TAG,))
PYTHONIC = ToolFamily(name="pythonic", read=pythonic.read, form=_OBJECTS, markers=(pythonic.START, pythonic.END))
"""Arguments as Python writes them follow no JSON schema; where they must, Llama 3's objects are asked for."""
_MISTRAL_MARKERS = (mistral.BEGIN, mistral.ARGS, mistral.CALL_ID)
MISTRAL = ToolFamily(
    name="mistral",
    read=mistral.read,
    form=CallForm(
        before='{"name": "',
        between='", "arguments": ',
        after="}",
        trigger=mistral.BEGIN,
        separator=", ",
        opening=mistral.BEGIN + "[",
        closing="]",
    ),
    markers=_MISTRAL_MARKERS,
    short_ids=True,
)
MISTRAL_NAMED = ToolFamily(
    name="mistral",
    read=mistral.read,
    form=CallForm(before=mistral.BEGIN, between=mistral.ARGS, after="", trigger=mistral.BEGIN),
    markers=_MISTRAL_MARKERS,
    short_ids=True,
)
_DEEPSEEK_MARKERS = (
    deepseek.CALLS_BEGIN,
    deepseek.CALLS_END,
    deepseek.CALL_BEGIN,
    deepseek.CALL_END,
    deepseek.SEPARATOR,
)
DEEPSEEK = ToolFamily(
    name="deepseek",
    read=deepseek.read,
    form=CallForm(
        before=deepseek.CALL_BEGIN + deepseek.KIND + deepseek.SEPARATOR,
        between="\n" + deepseek.FENCE,
        after=deepseek.FENCE_END + deepseek.CALL_END,
        trigger=deepseek.CALLS_BEGIN,
        separator="\n",
        opening=deepseek.CALLS_BEGIN,
        closing=deepseek.CALLS_END,
    ),
    markers=_DEEPSEEK_MARKERS,
)
DEEPSEEK_BARE = ToolFamily(
    name="deepseek",
    read=deepseek.read,
    form=CallForm(
        before=deepseek.CALL_BEGIN,
        between=deepseek.SEPARATOR,
        after=deepseek.CALL_END,
        trigger=deepseek.CALLS_BEGIN,
        opening=deepseek.CALLS_BEGIN,
        closing=deepseek.CALLS_END,
    ),
    markers=_DEEPSEEK_MARKERS,
)


def choose_family(name: ToolParserName, template: str) -> ToolFamily | None:
    """The family configured as `name` ("auto": by the markers in the chat template, Hermes's where it has none), in the
    variant that the template writes. None: outputs are not searched for calls."""
    if name == "auto":
        name = _family_of(template)
    if name == "mistral":
        return MISTRAL_NAMED if mistral.ARGS in template else MISTRAL
    if name == "deepseek":
        return DEEPSEEK if "```json" in template else DEEPSEEK_BARE
    return {"hermes": HERMES, "llama3": LLAMA3, "pythonic": PYTHONIC}.get(name)


def _family_of(template: str) -> ToolParserName:
    if mistral.BEGIN in template:
        return "mistral"
    if deepseek.CALLS_BEGIN in template:
        return "deepseek"
    if hermes.BEGIN in template:
        return "hermes"
    if pythonic.START in template or "[func_name" in template:
        return "pythonic"
    if llama3.PYTHON_TAG in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        return "llama3"
    return "hermes"
