"""POST /v1/chat/completions: OpenAI's chat API, with fields of SGLang and vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import Field

from protocol.rooms import Job
from protocol.scoring import Scoring
from router.api.chat_format import ChatFormat, ChatStyle
from router.api.chat_grammar import chat_grammar
from router.api.chat_messages import ChatMessage
from router.api.chat_prompt import ChatPrompt, render_prompt
from router.api.chat_tools import ToolChoice, ToolPlan, Tools, plan_tools
from router.api.fields import Whole, invalid, read_body
from router.api.openai import OpenAIFields
from router.api.prompts import ModelText
from router.api.score_limit import check_output_numbers, check_scores
from router.api.token_bans import check_no_grammar
from router.work import SequenceOutput, Work
from text.message import MessageReader
from text.reasoning import ReasoningSplitter
from text.tools.parser import ToolParser


class ChatRequest(OpenAIFields):
    unsupported: ClassVar[dict[str, Sequence[Any]]] = {
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "verbosity": ("medium",),
        "store": (False,),
        "moderation": (),
        "service_tier": ("auto", "default"),
        "best_of": (1,),
        "use_beam_search": (False,),
        "logits_processors": ([],),
        "stream_reasoning": (True,),
        "lora_path": (),
    }
    replaced: ClassVar[dict[str, str]] = {"functions": "tools", "function_call": "tool_choice"}

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] = 0
    prompt_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    """As vLLM: the prompt's own tokens, beside the choices."""

    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool = True

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """For chat templates that know it, or whether to think at all."""
    separate_reasoning: bool = True
    """As SGLang: false leaves reasoning in the content, tags and all."""
    include_reasoning: bool = True
    """As vLLM: false leaves it out."""

    add_generation_prompt: bool | None = None
    """True unless the final message is continued."""
    continue_final_message: bool = False
    """The output goes on with the last message, which is the assistant's; with `echo` it is shown with it."""
    echo: bool = False
    add_special_tokens: bool = False
    """Chat templates write the special tokens themselves."""
    chat_template: str | None = Field(None, min_length=1)
    """In the place of the model's; `router.allow_request_chat_template` allows it."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further names for the chat template, such as Qwen's enable_thinking."""
    documents: list[dict[str, Any]] = Field(default_factory=list)
    """For chat templates that know them: what the answer is to be drawn from."""

    return_token_ids: bool = False
    """As vLLM: the ids of the prompt's and the output's tokens, beside the text."""


async def parse_chat(body: bytes, model: ModelText) -> tuple[Work, list[SequenceOutput], ChatFormat]:
    """The work a request asks for and how to answer it; raises `ApiError`."""
    request = read_body(ChatRequest, body)
    model.check_name(request.model)
    plan = plan_tools(request.tools, request.tool_choice, parallel=request.parallel_tool_calls)
    prompt = render_prompt(request, plan, model)
    work = _work(request, plan, prompt, await _tokens(request, prompt, model), model)
    outputs = [SequenceOutput(job, model.tokenizer) for job in work.jobs]
    return work, outputs, ChatFormat(work, outputs, _style(request, plan, prompt), model=model)


async def _tokens(request: ChatRequest, prompt: ChatPrompt, model: ModelText) -> list[int]:
    (ids,) = await model.encode([prompt.text], param="messages", add_special_tokens=request.add_special_tokens)
    wanted = request.max_completion_tokens or request.max_tokens
    return request.last_tokens(ids, context_length=model.config.context_length, wanted=wanted)


def _work(request: ChatRequest, plan: ToolPlan, prompt: ChatPrompt, ids: list[int], model: ModelText) -> Work:
    wanted, name = request.max_completion_tokens, "max_completion_tokens"
    if wanted is None:
        wanted, name = request.max_tokens, "max_tokens"
    limit = model.output_room(len(ids), wanted, param="messages", limit_name=name, default=model.config.context_length)
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", f"{request.top_logprobs} needs logprobs; set logprobs to true")
    if request.echo and not request.continue_final_message:
        raise invalid("echo", "it shows the message that is continued; set continue_final_message, or leave it out")
    top = request.prompt_logprobs
    if top is not None and request.stream:
        raise invalid("prompt_logprobs", "only whole responses have them; leave prompt_logprobs or stream out")
    work = request.make_work(
        model,
        "chatcmpl",
        [ids],
        limits=[limit],
        limit_name=name,
        logprobs=request.top_logprobs if request.logprobs else None,
        scoring=None if top is None else Scoring(1, top, ranks=True),
    )
    check_scores(work.jobs, param="prompt_logprobs", value=top)
    described = "top_logprobs" if request.top_logprobs else "logprobs"
    check_output_numbers(work, most=model.config.max_logprobs, param=described, limit_name=name)
    chat = prompt.chat
    if plan.constrained and chat.family is None:
        field = "tool_choice" if plan.required else "tools"
        raise invalid(field, "this server reads no tool calls (router.tool_parser is none), so it cannot promise any")
    marks = chat.special_marks(model.tokenizer, tools=bool(plan.callable))
    asked = work.jobs[0].sampling.grammar
    grammar = chat_grammar(asked, plan, chat.family, prompt.thinking, marks, model.grammars)
    check_no_grammar(work.jobs[0].sampling, grammar)
    shown = tuple(marks.values())

    def completed(job: Job) -> Job:
        sampling = msgspec.structs.replace(job.sampling, grammar=grammar, shown_special_ids=shown)
        return msgspec.structs.replace(job, sampling=sampling)

    work.jobs[:] = map(completed, work.jobs)
    return work


def _style(request: ChatRequest, plan: ToolPlan, prompt: ChatPrompt) -> ChatStyle:
    family, thinking = prompt.chat.family, prompt.thinking
    names = frozenset(tool.name for tool in plan.callable)

    separate = request.separate_reasoning

    def make_reader() -> MessageReader:
        return MessageReader(
            reasoning=ReasoningSplitter(thinking) if thinking is not None and separate else None,
            tools=ToolParser(family.read, names) if family is not None and names else None,
        )

    return ChatStyle(
        logprobs=request.logprobs,
        token_ids=request.return_token_ids,
        prompt_logprobs=request.prompt_logprobs,
        reasons=thinking is not None and separate,
        reasoning=request.include_reasoning,
        echoed=request.messages[-1].text if request.echo else "",
        stream_options=request.stream_options,
        may_call=bool(names) and family is not None,
        short_call_ids=family is not None and family.short_ids,
        make_reader=make_reader,
    )
