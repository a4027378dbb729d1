"""What OpenAI's two generation endpoints share: fields beyond sampling, and the frame of a response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
import pydantic
from pydantic import Field

from protocol.rooms import Job
from protocol.sampling import Grammar, SamplingParams
from protocol.scoring import Scoring
from router.api.fields import ApiModel, Whole, invalid
from router.api.grammar_reader import GrammarReader
from router.api.prompts import ModelText
from router.api.response import DONE, encode, event, usage
from router.api.sampling import SamplingFields
from router.work import SequenceOutput, Work


class StreamOptions(ApiModel):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """As vLLM: with `include_usage`, every event tells the usage so far."""
    include_obfuscation: bool = False
    """Padding against guessing tokens by the length of events: accepted, but there is none."""


class OpenAIFields(SamplingFields):
    """Fields of both endpoints. Those that only describe the request to its owner change nothing here."""

    model: str | None = None
    max_tokens: Whole | None = Field(None, ge=1)
    min_tokens: Whole = Field(0, ge=0)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: Any = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    """As vLLM: requests share cached prefixes with those of the same salt only."""
    rid: str | None = Field(None, min_length=1, max_length=128)
    """As SGLang: the client's own name for the request, by which /abort_request ends it."""
    priority: Whole = Field(0, gt=-(2**31), lt=2**31)
    """As vLLM: of waiting requests those with the lowest go first."""
    spaces_between_special_tokens: bool = True
    """As vLLM and SGLang; tokenizers of the kind served here never put any, whatever it says."""
    truncate_prompt_tokens: Annotated[Whole, Field(ge=-1)] | None = None
    """As vLLM: of a longer prompt this many tokens; -1 is as many as the context leaves beside the output's."""
    truncation_side: Literal["left", "right"] = "left"
    """As vLLM: on which side tokens are left out."""
    return_timeline: bool = False
    """Ours: tell where the time went."""

    def last_tokens(self, prompt: list[int], *, context_length: int, wanted: int | None) -> list[int]:
        """What is left of a prompt, when `wanted` tokens are to follow it."""
        most = self.truncate_prompt_tokens
        if most == -1:
            most = max(1, context_length - (wanted or 1))
        if most is None:
            return prompt
        return prompt[:most] if self.truncation_side == "right" else prompt[-most:]

    @pydantic.field_validator("truncate_prompt_tokens")
    @classmethod
    def _leaves_some(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("no token would be left; give 1 or more, or -1 for what the context leaves")
        return value

    def grammars(self, reader: GrammarReader) -> list[Grammar]:
        return [*reader.response_format(self.response_format), *super().grammars(reader)]

    def make_work(
        self,
        model: ModelText,
        kind: str,
        prompts: Sequence[list[int]],
        *,
        limits: Sequence[int],
        limit_name: str = "max_tokens",
        logprobs: int | None,
        choices: int | None = None,
        scoring: Scoring | None = None,
    ) -> Work:
        """The work for `prompts`, each `n` times and of at most its limit of tokens, which the API calls so.

        `choices` are more than `n` where the best are to be chosen; `scoring` is wanted of every prompt.
        """
        # One seed for all: sequences differ by their choice, and a seed given by the client names the whole response.
        seed = model.stamp.seed if self.seed is None else self.seed
        sampling = self.params(
            max_tokens=min(limits),
            min_tokens=self.min_tokens,
            names=("min_tokens", limit_name),
            seed=seed,
            logprobs=logprobs,
            tokenizer=model.tokenizer,
            reader=model.grammars,
        )
        work = make_work(
            model,
            response_id=f"{kind}-{model.stamp.token}",
            cache_salt=self.cache_salt,
            prompts=prompts,
            sampling=[msgspec.structs.replace(sampling, max_tokens=limit) for limit in limits],
            choices=self.n if choices is None else choices,
            stream=self.stream,
            timeline=self.return_timeline,
            scoring=[scoring] * len(prompts),
            priority=-self.priority,
        )
        return work if self.rid is None else replace(work, names={self.rid: range(len(work.jobs))})


def make_work(
    model: ModelText,
    *,
    response_id: str,
    cache_salt: str | None,
    prompts: Sequence[list[int]],
    sampling: Sequence[SamplingParams],
    choices: int,
    stream: bool,
    timeline: bool,
    scoring: Sequence[Scoring | None],
    priority: int = 0,
) -> Work:
    """Prompts times choices; raises `ApiError` (400) for more sequences than one request may have."""
    total, most = len(prompts) * choices, model.config.max_sequences_per_request
    if total > most:
        message = (
            f"{choices} choices of {len(prompts)} prompts are {total} sequences, over the limit of {most} a request"
        )
        raise invalid("n", message)
    jobs = [
        Job(
            prompt=prompt,
            sampling=params,
            choice=choice,
            namespace=model.stamp.namespace(cache_salt),
            timeline=timeline,
            scoring=scored if choice == 0 else None,  # the others' are the same
            priority=priority,
        )
        for prompt, params, scored in zip(prompts, sampling, scoring, strict=True)
        for choice in range(choices)
    ]
    return Work(response_id=response_id, jobs=jobs, choices=choices, stream=stream)


class OpenAIFrame:
    """The parts of a response around its choices."""

    def __init__(
        self,
        work: Work,
        outputs: Sequence[SequenceOutput],
        *,
        kind: str,
        model: ModelText,
        stream_options: StreamOptions,
        reasoning_tokens: Callable[[], int] | None = None,
    ) -> None:
        """`reasoning_tokens`, asked at the end, is how many tokens were reasoning; None where there is none."""
        self._work = work
        self._outputs = outputs
        self._usage_event = stream_options.include_usage
        self.tells_usage = stream_options.include_usage and stream_options.continuous_usage_stats
        """In every chunk."""
        self._reasoning_tokens = reasoning_tokens
        self._head: dict[str, Any] = {
            "id": work.response_id,
            "object": kind,
            "created": model.stamp.created,
            "model": model.config.model_name,
            "system_fingerprint": model.fingerprint,
        }

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A stream's chunk with one choice."""
        chunk = {**self._head, "choices": [choice]}
        if self._usage_event:
            chunk["usage"] = usage(self._work, self._outputs) if self.tells_usage else None
        return chunk

    def closing(self) -> bytes:
        """Usage and timeline, where they were asked for, and the end mark."""
        asked = self._timeline()
        if self._usage_event:
            asked["usage"] = self._usage()
        return event({**self._head, "choices": [], **asked}) + DONE if asked else DONE

    def whole(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """The whole response, usage included; `more` stands beside the choices."""
        told = {"usage": self._usage(), **self._timeline(), **more}
        return encode({**self._head, "choices": choices, **told})

    def _usage(self) -> dict[str, Any]:
        told = usage(self._work, self._outputs)
        if self._reasoning_tokens is not None:
            told["completion_tokens_details"] = {"reasoning_tokens": self._reasoning_tokens()}
        return told

    def _timeline(self) -> dict[str, Any]:
        """Each sequence's timeline, by the index of its choice, if the request asked."""
        told = [
            {"index": index, **output.timeline.as_json()}
            for index, output in enumerate(self._outputs)
            if output.timeline is not None
        ]
        return {"timeline": told} if told else {}
