"""How the served model chats, as its template and the configuration say."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from protocol.rooms import PROTOCOL_VERSION
from router.config import RouterConfig
from text.chat_template import ChatTemplate
from text.reasoning import TAGS, ReasoningStyle, choose_style
from text.tokenizer import Tokenizer
from text.tools.families import ToolFamily, choose_family


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """Made once for the model's template, and once more for one that a request brings."""

    template: ChatTemplate
    family: ToolFamily | None
    """How calls of tools are written and read; None: they are not read."""
    style: ReasoningStyle | None
    """How reasoning is told from the answer; None: it is not."""
    knows_tools: bool
    """The template shows the model the tools."""
    knows_calls: bool
    """It shows the assistant's calls and the tools' results."""
    with_tools: ChatModel | None
    """What stands in for it in conversations with tools, where the model has a template of their own for them."""

    @classmethod
    def of(cls, template: ChatTemplate, config: RouterConfig) -> ChatModel:
        return cls(
            template=template,
            family=choose_family(config.tool_parser, template.source),
            style=choose_style(config.reasoning_parser, template.source),
            knows_tools="tools" in template.names,
            knows_calls="tool_calls" in template.source,
            with_tools=None if template.for_tools is None else cls.of(template.for_tools, config),
        )

    def special_marks(self, tokenizer: Tokenizer, *, tools: bool) -> dict[str, int]:
        """The marks of reasoning, and of calls, that are special tokens: they must be seen in the output's text."""
        marks = {*(TAGS if self.style is not None else ())}
        if tools and self.family is not None:
            marks.update(self.family.markers)
        named = ((tokenizer.token_text(token), token) for token in sorted(tokenizer.special_ids))
        return {name: token for name, token in named if name in marks}


def fingerprint(config: RouterConfig, template: ChatTemplate | None) -> str:
    """OpenAI's `system_fingerprint`: the same where the same request, with a seed, has the same answer."""
    parts = (config.model_name, config.context_length, template.source if template else None, PROTOCOL_VERSION)
    return "fp_" + hashlib.blake2b(repr(parts).encode(), digest_size=5).hexdigest()
