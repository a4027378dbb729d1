"""POST /v1/completions: OpenAI's text completion API, for one prompt or several, as text or token ids.

With `echo` a choice begins with its prompt, and `logprobs` then tell the prompt's own tokens too; with `max_tokens` 0
as well that is all there is. `best_of` generates more choices than are answered and keeps those with the highest sum
of log-probabilities. `prompt_logprobs` and `return_token_ids` are vLLM's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from protocol.scoring import Scoring
from router.api.completion_logprobs import CompletionLogprobs, joined, prompt_logprobs
from router.api.fields import Whole, invalid, read_body
from router.api.openai import OpenAIFields, OpenAIFrame
from router.api.prompt_gate import PromptGate
from router.api.prompts import ModelText, Prompts, read_prompts
from router.api.response import FINISH_WORDS, Splice, event
from router.api.score_limit import check_output_numbers, check_scores
from router.work import Delta, SequenceOutput, Work

_DEFAULT_TOKENS = 16
"""What OpenAI generates when max_tokens is not given."""


class CompletionRequest(OpenAIFields):
    unsupported: ClassVar[dict[str, Sequence[Any]]] = {
        "suffix": ("",),
        "logits_processors": ([],),
        "store": (False,),
        "service_tier": ("auto", "default"),
    }

    in_bulk: ClassVar[frozenset[str]] = frozenset({"prompt"})

    prompt: Prompts
    max_tokens: Whole | None = Field(None, ge=0)
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    prompt_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    echo: bool = False
    add_special_tokens: bool = True
    """Whether a text begins as the tokenizer has texts begin."""
    best_of: Whole | None = Field(None, ge=1)
    return_token_ids: bool = False

    @property
    def scoring(self) -> Scoring | None:
        """What the prompt's own tokens are to be described by."""
        if self.prompt_logprobs is not None:
            return Scoring(1, max(self.prompt_logprobs, self.logprobs or 0), ranks=True)
        return Scoring(1, self.logprobs) if self.echo and self.logprobs is not None else None

    def check(self) -> None:
        """Raises `ApiError` (400) for fields that do not go together."""
        best_of = self.n if self.best_of is None else self.best_of
        if best_of < self.n:
            raise invalid("best_of", f"{best_of} choices are not enough for n, which is {self.n}; raise best_of")
        if self.stream and best_of > self.n:
            raise invalid("best_of", "the best choices are known at the end only; leave best_of or stream out")
        if self.stream and self.prompt_logprobs is not None:
            raise invalid("prompt_logprobs", "only whole responses have them; leave prompt_logprobs or stream out")
        if self.max_tokens == 0 and self.min_tokens:
            raise invalid("min_tokens", f"{self.min_tokens} is more than max_tokens, which is 0 here")


class CompletionFormat:
    """Writes text completions and their chunks."""

    def __init__(
        self,
        work: Work,
        outputs: Sequence[SequenceOutput],
        request: CompletionRequest,
        *,
        model: ModelText,
        echoes: Sequence[str],
    ) -> None:
        """`echoes` are what the choices of each prompt begin with."""
        self._work = work
        self._outputs = outputs
        self._request = request
        self._tokenizer = model.tokenizer
        self._echoes = echoes
        self._gate = PromptGate(outputs, choices=work.choices)
        self._frame = OpenAIFrame(
            work,
            outputs,
            kind="text_completion",
            model=model,
            stream_options=request.stream_options,
        )
        self._splices = [Splice(functools.partial(self._text_chunk, index)) for index in range(len(outputs))]
        self._logprobs = [
            CompletionLogprobs(
                model.tokenizer, top=request.logprobs or 0, skip_special_tokens=request.skip_special_tokens
            )
            for _ in outputs
        ]
        self._told = [0] * len(outputs)
        """Tokens of each sequence that the stream has named."""
        self._begun: set[int] = set()

    def opening(self) -> bytes:
        return b""

    def piece(self, index: int, delta: Delta) -> bytes:
        return b"".join(self._written(*piece) for piece in self._gate.take(index, delta))

    def closing(self) -> bytes:
        return self._frame.closing()

    def whole(self) -> bytes:
        choices = []
        for prompt, echo in enumerate(self._echoes):
            for place, index in enumerate(self._best(prompt)):
                output = self._outputs[index]
                choice = self._choice(
                    prompt * self._request.n + place,
                    echo + output.text,
                    logprobs=self._described(index, output.events, echoed=self._request.echo),
                    finish=output,
                )
                scores = self._gate.first(index).scores
                if self._request.prompt_logprobs is not None and scores is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(
                        self._tokenizer, output.job.prompt, scores, top=self._request.prompt_logprobs
                    )
                if self._request.return_token_ids:
                    choice |= {"prompt_token_ids": output.job.prompt, "token_ids": output.tokens}
                choices.append(choice)
        return self._frame.whole(choices)

    def _best(self, prompt: int) -> list[int]:
        """The sequences of a prompt that are answered, best first where there are more."""
        first, n = prompt * self._work.choices, self._request.n
        indices = list(range(first, first + self._work.choices))
        if self._work.choices > n:
            indices.sort(key=lambda index: -self._outputs[index].logprob_sum)
        return indices[:n]

    def _written(self, index: int, delta: Delta) -> bytes:
        echoed = self._request.echo and index not in self._begun
        self._begun.add(index)
        text = self._echoes[index // self._work.choices] + delta.text if echoed else delta.text
        plain = self._request.logprobs is None and not self._request.return_token_ids
        if delta.finish is None and plain and (not text or not self._frame.tells_usage):
            return self._splices[index](text) if text else b""
        finish = self._outputs[index] if delta.finish is not None else None
        logprobs = self._described(index, delta.events, echoed=echoed)
        choice = self._choice(index, text, logprobs=logprobs, finish=finish)
        if self._request.return_token_ids:
            if not self._told[index]:
                choice["prompt_token_ids"] = self._outputs[index].job.prompt
            choice["token_ids"] = self._outputs[index].tokens[self._told[index] :]
            self._told[index] += len(choice["token_ids"])
        return event(self._frame.chunk(choice))

    def _described(self, index: int, events: Sequence[Any], *, echoed: bool) -> dict[str, Any] | None:
        """`logprobs` of the next tokens of a choice, after those of its prompt if that is `echoed` here."""
        if self._request.logprobs is None:
            return None
        first = self._gate.first(index)
        told = self._logprobs[index].of_prompt(first.job.prompt, first.scores) if echoed else None
        return joined(told, self._logprobs[index].of_output(events))

    def _text_chunk(self, index: int, text: str) -> dict[str, Any]:
        return self._frame.chunk(self._choice(index, text, logprobs=None, finish=None))

    def _choice(
        self, index: int, text: str, *, logprobs: dict[str, Any] | None, finish: SequenceOutput | None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        if finish is not None and finish.finish is not None:
            choice |= {"finish_reason": FINISH_WORDS[finish.finish], "matched_stop": finish.matched}
        return choice


async def parse_completion(body: bytes, model: ModelText) -> tuple[Work, list[SequenceOutput], CompletionFormat]:
    """The work a request asks for and how to answer it; raises `ApiError`."""
    request = read_body(CompletionRequest, body)
    model.check_name(request.model)
    request.check()
    given = await read_prompts(request.prompt, model, param="prompt", add_special_tokens=request.add_special_tokens)
    room = model.config.context_length
    prompts = [request.last_tokens(ids, context_length=room, wanted=request.max_tokens) for ids in given]
    limits = [
        model.output_room(
            len(prompt), request.max_tokens, param="prompt", limit_name="max_tokens", default=_DEFAULT_TOKENS
        )
        for prompt in prompts
    ]
    choices = request.n if request.best_of is None else request.best_of
    ranked = 0 if choices > request.n else None
    work = request.make_work(
        model,
        "cmpl",
        prompts,
        limits=[max(limit, 1) for limit in limits],
        logprobs=ranked if request.logprobs is None else request.logprobs,
        choices=choices,
        scoring=request.scoring,
    )
    named = "logprobs" if (request.prompt_logprobs or 0) < (request.logprobs or 0) else "prompt_logprobs"
    check_scores(work.jobs, param=named, value=getattr(request, named))
    described = "best_of" if request.logprobs is None else "logprobs"
    check_output_numbers(work, most=model.config.max_logprobs, param=described, limit_name="max_tokens")
    outputs = [SequenceOutput(job, model.tokenizer, keeps_tokens=request.max_tokens != 0) for job in work.jobs]
    echoes = _echoes(request, prompts, model) if request.echo else [""] * len(prompts)
    return work, outputs, CompletionFormat(work, outputs, request, model=model, echoes=echoes)


def _echoes(request: CompletionRequest, prompts: Sequence[list[int]], model: ModelText) -> list[str]:
    """Each prompt as text: as it came, or made from its ids."""
    if isinstance(request.prompt, str) and request.truncate_prompt_tokens is None:
        return [request.prompt]
    whole = [] if request.truncate_prompt_tokens is not None else request.prompt
    texts = [each for each in whole if isinstance(each, str)]
    skip = request.skip_special_tokens
    return texts or [model.tokenizer.decode(ids, skip_special_tokens=skip) for ids in prompts]
