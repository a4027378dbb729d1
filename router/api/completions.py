"""POST /v1/completions: OpenAI's text completion API, for one prompt or several, as text or token ids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from router.api.fields import Whole, read_body
from router.api.openai import OpenAIFields, OpenAIFrame
from router.api.prompts import ModelText, read_prompts
from router.api.response import FINISH_WORDS, Splice, completion_logprobs, event
from router.work import Delta, SequenceOutput, Work

_DEFAULT_TOKENS = 16
"""What OpenAI generates when max_tokens is not given."""


class CompletionRequest(OpenAIFields):
    unsupported: ClassVar[dict[str, Sequence[Any]]] = {
        "suffix": ("",),
        "echo": (False,),
        "best_of": (1,),
        "prompt_logprobs": (),
        "store": (False,),
        "service_tier": ("auto", "default"),
    }

    prompt: Any
    """Text, token ids, or a list of either; read by `parse_completion`."""
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None


class CompletionFormat:
    """Writes text completions and their chunks."""

    def __init__(
        self, work: Work, outputs: Sequence[SequenceOutput], request: CompletionRequest, *, model: ModelText
    ) -> None:
        self._outputs = outputs
        self._tokenizer = model.tokenizer
        self._logprobs = request.logprobs is not None
        self._frame = OpenAIFrame(
            work,
            outputs,
            kind="text_completion",
            model=model.config.model_name,
            created=model.stamp.created,
            usage_event=request.stream_options.include_usage,
        )
        self._splices = [Splice(functools.partial(self._chunk, index)) for index in range(len(outputs))]
        self._offsets = [0] * len(outputs)

    def opening(self) -> bytes:
        return b""

    def piece(self, index: int, delta: Delta) -> bytes:
        if delta.finish is None and not self._logprobs:
            return self._splices[index](delta.text) if delta.text else b""
        logprobs = None
        if self._logprobs:
            logprobs = completion_logprobs(self._tokenizer, delta.events, offset=self._offsets[index])
            self._offsets[index] += sum(map(len, logprobs["tokens"]))
        return event(self._chunk(index, delta.text, logprobs=logprobs, finish=self._outputs[index]))

    def closing(self) -> bytes:
        return self._frame.closing()

    def whole(self) -> bytes:
        choices = []
        for index, output in enumerate(self._outputs):
            logprobs = completion_logprobs(self._tokenizer, output.events, offset=0) if self._logprobs else None
            choices.append(_choice(index, output.text, logprobs, output))
        return self._frame.whole(choices)

    def _chunk(
        self,
        index: int,
        text: str,
        *,
        logprobs: dict[str, Any] | None = None,
        finish: SequenceOutput | None = None,
    ) -> dict[str, Any]:
        return self._frame.chunk(_choice(index, text, logprobs, finish))


async def parse_completion(body: bytes, model: ModelText) -> tuple[Work, list[SequenceOutput], CompletionFormat]:
    """The work a request asks for and how to answer it; raises `ApiError`."""
    request = read_body(CompletionRequest, body)
    model.check_name(request.model)
    prompts = await read_prompts(request.prompt, model, param="prompt")
    limits = [
        model.output_room(
            len(prompt), request.max_tokens, param="prompt", limit_name="max_tokens", default=_DEFAULT_TOKENS
        )
        for prompt in prompts
    ]
    work = request.make_work(model, "cmpl", prompts, limits=limits, logprobs=request.logprobs)
    outputs = [SequenceOutput(job, model.tokenizer) for job in work.jobs]
    return work, outputs, CompletionFormat(work, outputs, request, model=model)


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish: SequenceOutput | None) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
    if finish is not None and finish.finish is not None:
        choice |= {"finish_reason": FINISH_WORDS[finish.finish], "matched_stop": finish.matched}
    return choice
