"""POST /v1/chat/completions: OpenAI's chat API."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import BeforeValidator, Field

from router.api.fields import ApiModel, Whole, invalid, read_body
from router.api.openai import OpenAIFields, OpenAIFrame
from router.api.prompts import ModelText
from router.api.response import FINISH_WORDS, Splice, chat_logprobs, event
from router.errors import ApiError
from router.work import Delta, SequenceOutput, Work
from text.chat_template import RESERVED_NAMES, ChatTemplateError


class TextPart(ApiModel):
    type: Literal["text"]
    text: str


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError("give a text, or a list of text parts")
    return content


class ChatMessage(ApiModel):
    unsupported = {"tool_calls": ([],), "function_call": (), "tool_call_id": (), "audio": (), "refusal": ()}

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]
    name: str | None = None

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

    def for_template(self) -> dict[str, Any]:
        """As templates know messages: developer messages are system messages, parts are lines of one text."""
        content = "\n".join(part.text for part in self.content)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatRequest(OpenAIFields):
    unsupported: ClassVar[dict[str, Sequence[Any]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "reasoning_effort": (),
        "verbosity": (),
        "store": (False,),
        "service_tier": ("auto", "default"),
        "continue_final_message": (False,),
        "add_generation_prompt": (True,),
        "best_of": (1,),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] = 0
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further names for the model's template, such as Qwen's enable_thinking."""


class ChatFormat:
    """Writes chat completions and their chunks."""

    def __init__(
        self, work: Work, outputs: Sequence[SequenceOutput], request: ChatRequest, *, model: ModelText
    ) -> None:
        self._outputs = outputs
        self._tokenizer = model.tokenizer
        self._logprobs = request.logprobs
        self._frame = OpenAIFrame(
            work,
            outputs,
            kind="chat.completion.chunk" if work.stream else "chat.completion",
            model=model.config.model_name,
            created=model.stamp.created,
            usage_event=request.stream_options.include_usage,
        )
        self._splices = [Splice(functools.partial(self._text_chunk, index)) for index in range(len(outputs))]

    def opening(self) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(event(self._chunk(index, role)) for index in range(len(self._outputs)))

    def piece(self, index: int, delta: Delta) -> bytes:
        written = b""
        if self._logprobs and delta.events:
            logprobs = chat_logprobs(self._tokenizer, delta.events)
            written = event(self._chunk(index, {"content": delta.text}, logprobs=logprobs))
        elif delta.text:
            written = self._splices[index](delta.text)
        if delta.finish is not None:
            written += event(self._chunk(index, {}, finish=self._outputs[index]))
        return written

    def closing(self) -> bytes:
        return self._frame.closing()

    def whole(self) -> bytes:
        choices = []
        for index, output in enumerate(self._outputs):
            logprobs = chat_logprobs(self._tokenizer, output.events) if self._logprobs else None
            message = {"role": "assistant", "content": output.text}
            choices.append({"index": index, "message": message, "logprobs": logprobs, **_ending(output)})
        return self._frame.whole(choices)

    def _text_chunk(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"content": text})

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish: SequenceOutput | None = None,
    ) -> dict[str, Any]:
        ending = _ending(finish) if finish is not None else {"finish_reason": None}
        return self._frame.chunk({"index": index, "delta": delta, "logprobs": logprobs, **ending})


async def parse_chat(body: bytes, model: ModelText) -> tuple[Work, list[SequenceOutput], ChatFormat]:
    """The work a request asks for and how to answer it; raises `ApiError`."""
    request = read_body(ChatRequest, body)
    model.check_name(request.model)
    prompt = await _prompt(request, model)
    wanted, name = request.max_completion_tokens, "max_completion_tokens"
    if wanted is None:
        wanted, name = request.max_tokens, "max_tokens"
    limit = model.output_room(
        len(prompt), wanted, param="messages", limit_name=name, default=model.config.context_length
    )
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", f"{request.top_logprobs} needs logprobs; set logprobs to true")
    logprobs = request.top_logprobs if request.logprobs else None
    work = request.make_work(model, "chatcmpl", [prompt], limits=[limit], limit_name=name, logprobs=logprobs)
    outputs = [SequenceOutput(job, model.tokenizer) for job in work.jobs]
    return work, outputs, ChatFormat(work, outputs, request, model=model)


async def _prompt(request: ChatRequest, model: ModelText) -> list[int]:
    if model.template is None:
        name = model.config.model_name
        message = f"{name} has no chat template; use /v1/completions, or add chat_template.jinja to the model's folder"
        raise ApiError(400, message, param="messages", code="no_chat_template")
    if taken := RESERVED_NAMES & request.chat_template_kwargs.keys():
        raise invalid("chat_template_kwargs", f"{min(taken)} is set by this API itself; leave it out")
    messages = [message.for_template() for message in request.messages]
    try:
        text = model.template.render(messages, variables=request.chat_template_kwargs)
    except ChatTemplateError as error:
        raise ApiError(400, str(error), param="messages", code="chat_template_error") from error
    # The template writes the special tokens itself.
    (prompt,) = await model.encode([text], param="messages", add_special_tokens=False)
    return prompt


def _ending(output: SequenceOutput) -> dict[str, Any]:
    assert output.finish is not None
    return {"finish_reason": FINISH_WORDS[output.finish], "matched_stop": output.matched}
