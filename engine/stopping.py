"""When a sequence ends: end-of-sequence and stop tokens, stop strings and regexes, length.

A `Stopper` belongs to one request from its registration to its end, preemptions included, and sees every generated
token once, in order. Text is only derived for requests that it can end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from engine.request import Request
from protocol.sampling import FinishReason
from text.output_text import OutputText
from text.tokenizer import Tokenizer


class StopText(Protocol):
    """The growing text of one sequence, watched for stop strings and regexes."""

    def push(self, token: int) -> tuple[str, str | None]:
        """(text, the stop string or regex this token completed or None)."""


StopTextFactory = Callable[[Request], StopText]
Ending = tuple[FinishReason, str | int | None]
"""Why a sequence ended, and the stop string, regex or token that did it."""


def stop_texts(tokenizer: Tokenizer) -> StopTextFactory:
    """Makes the text of a request as the router does, so that both see the same end."""

    def make(request: Request) -> StopText:
        prompt = request.tokens[: request.num_prompt_tokens]
        return OutputText(tokenizer, prompt[-_CONTEXT_TOKENS:].tolist(), request.sampling)

    return make


_CONTEXT_TOKENS = 16
"""Last tokens of the prompt given to the detokeniser, which uses fewer."""


class Stopper:
    """Decides after each generated token whether the sequence ends there. Those that end by text need `stop_texts`."""

    def __init__(self, request: Request, *, eos_token_ids: Iterable[int], stop_texts: StopTextFactory | None) -> None:
        sampling = request.sampling
        ends = set(sampling.stop_token_ids)
        if not sampling.ignore_eos or sampling.grammar is not None:  # a grammar can demand its end
            ends.update(eos_token_ids)
        self._ends = frozenset(ends)
        self._limit = request.limit
        self._text: StopText | None = None
        if sampling.ends_by_text:
            assert stop_texts is not None, "a request that ends by text was let in without a way to make text"
            self._text = stop_texts(request)
            for token in request.generated:
                self._text.push(token)

    def check(self, token: int, *, length: int) -> Ending | None:
        """How the sequence ends with `token`, its `length`-th in all; None when it goes on.

        That no stop token comes before `min_tokens` is the sampler's doing.
        """
        if token in self._ends:
            return FinishReason.STOP_TOKEN, token
        if self._text is not None:
            _, matched = self._text.push(token)
            if matched is not None:
                return FinishReason.STOP_STRING, matched
        if length >= self._limit:
            return FinishReason.LENGTH, None
        return None
