"""From a chat request to the text of its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from router.api.chat_messages import ChatMessage
from router.api.chat_model import ChatModel
from router.api.chat_tools import ToolPlan
from router.api.fields import invalid, shown
from router.api.prompts import ModelText
from router.errors import ApiError
from text.chat_template import RESERVED_NAMES, ChatTemplateError
from text.reasoning import Thinking, thinking_after
from text.tools.untrained import with_calls_written, with_tools_described


class Conversation(Protocol):
    """The fields that the prompt is made of."""

    @property
    def messages(self) -> list[ChatMessage]: ...
    @property
    def add_generation_prompt(self) -> bool | None: ...
    @property
    def continue_final_message(self) -> bool: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]: ...
    @property
    def reasoning_effort(self) -> str | None: ...
    @property
    def documents(self) -> list[dict[str, Any]]: ...


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    text: str
    chat: ChatModel
    thinking: Thinking | None
    """How the output begins; None where the model does not reason."""


def render_prompt(request: Conversation, plan: ToolPlan, model: ModelText) -> ChatPrompt:
    """Raises `ApiError` (400) for what the template, or this server, refuses."""
    chat = _chat_model(request, model)
    if plan.given and chat.with_tools is not None:
        chat = chat.with_tools
    if request.documents and "documents" not in chat.template.names:
        raise invalid("documents", "this model's chat template knows none; write them into a message")
    continued = _continued(request)
    messages = [message.for_template() for message in request.messages]
    tools = [tool.for_template for tool in plan.given]
    form = chat.family.form if chat.family is not None else None
    if form is not None and not chat.knows_calls:
        messages = with_calls_written(messages, form)
    if form is not None and tools and not chat.knows_tools:
        messages = with_tools_described(messages, tools, form)
    try:
        text = chat.template.render(
            messages,
            tools=tools or None,
            documents=request.documents or None,
            add_generation_prompt=request.add_generation_prompt is not False,
            continue_final=request.continue_final_message,
            variables=_variables(request, chat),
        )
    except ChatTemplateError as error:
        raise ApiError(400, str(error), param="messages", code="chat_template_error") from error
    thinking = None if chat.style is None else thinking_after(text, chat.style, continued=continued)
    return ChatPrompt(text=text, chat=chat, thinking=thinking)


def _chat_model(request: Conversation, model: ModelText) -> ChatModel:
    if model.chat is None:
        name = model.config.model_name
        message = (
            f"{name} has no chat template; use /v1/completions, set model.chat_template in the configuration, "
            "or add chat_template.jinja to the model's folder"
        )
        raise ApiError(400, message, param="messages", code="no_chat_template")
    if request.chat_template is None:
        return model.chat
    # Rendering a template can take as long as its author likes, so not everybody may bring one.
    if not model.config.allow_request_chat_template:
        message = (
            "chat_template is not allowed in requests here; leave it out, "
            "or have router.allow_request_chat_template set in the configuration"
        )
        raise ApiError(400, message, param="chat_template", code="unsupported_parameter")
    try:
        return ChatModel.of(model.chat.template.with_source(request.chat_template), model.config)
    except ChatTemplateError as error:
        raise invalid("chat_template", str(error)) from error


def _continued(request: Conversation) -> str | None:
    """The beginning of the answer, if the last message is one."""
    if not request.continue_final_message:
        return None
    if request.add_generation_prompt:
        raise invalid("continue_final_message", "add_generation_prompt begins another message; set one of them")
    last = request.messages[-1]
    if last.role != "assistant" or last.tool_calls:
        raise invalid(
            "continue_final_message", "the last message is no text of the assistant; end with one to continue"
        )
    return last.text


def _variables(request: Conversation, chat: ChatModel) -> dict[str, Any]:
    variables = dict(request.chat_template_kwargs)
    if taken := RESERVED_NAMES & variables.keys():
        raise invalid("chat_template_kwargs", f"{min(taken)} is set by this API itself; leave it out")
    effort = request.reasoning_effort
    if effort is None:
        return variables
    if "reasoning_effort" in chat.template.names:
        return {"reasoning_effort": effort, **variables}
    if "enable_thinking" in chat.template.names:
        return {"enable_thinking": effort != "none", **variables}
    message = f"{shown(effort)} cannot be honoured, this model's chat template knows no effort; leave it out"
    raise invalid("reasoning_effort", message)
