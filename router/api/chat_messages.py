"""The messages of a chat request, and what a chat template is given of them."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import BeforeValidator, Field, WithJsonSchema

from router.api.fields import ApiModel, Whole, shown


class TextPart(ApiModel):
    type: Literal["text"]
    text: str


class RefusalPart(ApiModel):
    """What an assistant declined to do; text to the model."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


def _readable(part: Any) -> Any:
    """Refuses parts that are no text, by their type."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind not in ("text", "refusal"):
        raise ValueError(f"parts of type {shown(kind)} are not supported, this model reads text only; send text parts")
    return part


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type"), BeforeValidator(_readable)]


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is None:
        return None
    if not isinstance(content, list):
        raise ValueError("give a text, or a list of text parts")
    return content


_CONTENT_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}],
    "description": "A text, or parts of type text (and refusal, of an assistant).",
}
Content = Annotated[list[Part] | None, BeforeValidator(_as_parts), WithJsonSchema(_CONTENT_SCHEMA)]


class GivenFunction(ApiModel):
    name: str = Field(min_length=1)
    arguments: str | dict[str, Any]
    """JSON in a text, or the object itself."""


class GivenCall(ApiModel):
    """A call that the assistant made earlier; `index` is what clients keep of a stream."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: GivenFunction
    index: Whole | None = None

    def for_template(self) -> dict[str, Any]:
        arguments = self.function.arguments
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
                json.dumps(arguments, ensure_ascii=False).encode()  # half a character, which JSON can name, is no text
            except (ValueError, RecursionError):
                arguments = self.function.arguments  # cut short, perhaps: shown as it is
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class ChatMessage(ApiModel):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"function_call": (), "audio": (), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: str | None = None
    tool_calls: list[GivenCall] = Field(default_factory=list)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """What the assistant thought; vLLM's name for it is `reasoning`."""
    reasoning: str | None = None
    refusal: str | None = None
    content: Content = Field(None, validate_default=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """Clients send back what they were given, with null for what there was none of."""
        if not isinstance(value, dict):
            return value
        fields = {name: field for name, field in value.items() if field is not None}
        for name in fields.keys() & cls.unsupported.keys():
            if fields.pop(name) not in cls.unsupported[name]:
                raise ValueError(f"{name} is not supported; leave it out")
        return fields

    @pydantic.field_validator("content")
    @classmethod
    def _said_something(cls, value: list[Part] | None, info: pydantic.ValidationInfo) -> list[Part] | None:
        if value is None and not (info.data.get("tool_calls") or info.data.get("refusal")):
            raise ValueError("it is missing; give a text, or a list of text parts")
        return value

    @pydantic.model_validator(mode="after")
    def _fits_its_role(self) -> ChatMessage:
        for name, role in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                raise ValueError(f"{name} belongs to messages with the role {role}, not {self.role}")
        return self

    @property
    def text(self) -> str:
        """Its parts, as lines of one text."""
        if self.content is None:
            return self.refusal or ""
        return "\n".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """As templates know messages; developer messages are system messages."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
        }
        optional = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content or self.reasoning,
            "tool_calls": [call.for_template() for call in self.tool_calls] or None,
        }
        return message | {name: value for name, value in optional.items() if value is not None}
