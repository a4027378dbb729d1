"""Writes SGLang's outputs: whole, or as a stream in which each event repeats all there is so far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from protocol.sampling import FinishReason
from router.api.growing import GrowingList, GrowingText
from router.api.prompt_gate import PromptGate
from router.api.response import DONE, encode, event
from router.score_log import ScoreLog
from router.work import Delta, SequenceOutput
from text.tokenizer import Tokenizer

_WEIGHT_VERSION = "default"
"""What SGLang calls weights that were never exchanged while it ran."""

_Logprob = tuple[float | None, int, str | None]
"""(logprob, token, its text if that was asked for)."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What of one output's log-probabilities was asked for."""

    start_len: int
    """Position of the first prompt token named, which has no logprob itself."""
    top: int
    tokens: list[int]
    with_text: bool


class NativeFormat:
    """Of one request."""

    def __init__(
        self,
        outputs: Sequence[SequenceOutput],
        ids: Sequence[str],
        described: Sequence[Described | None],
        *,
        tokenizer: Tokenizer,
        choices: int,
        many: bool,
        prompt_ids: bool,
    ) -> None:
        """`ids` are what each output is called; `described` is each prompt's. `prompt_ids`: show its tokens, too."""
        self._outputs = outputs
        self._ids = ids
        self._many = many
        self._prompt_ids = prompt_ids
        self._gate = PromptGate(outputs, choices=choices)
        self._written = [
            _Written(output, described[index // choices], tokenizer) for index, output in enumerate(outputs)
        ]
        self._began = time.monotonic()

    def opening(self) -> bytes:
        return b""

    def piece(self, index: int, delta: Delta) -> bytes:
        # What was held back is all in the newest event of its sequence.
        indices = dict.fromkeys(each for each, _ in self._gate.take(index, delta))
        return b"".join(event(self._numbered(each)) for each in indices)

    def closing(self) -> bytes:
        return DONE

    def whole(self) -> bytes:
        outputs = [self._output(index) for index in range(len(self._outputs))]
        return encode(outputs if self._many else outputs[0])

    def _numbered(self, index: int) -> dict[str, Any]:
        output = self._output(index)
        return {**output, "index": index} if self._many else output

    def _output(self, index: int) -> dict[str, Any]:
        output, written = self._outputs[index], self._written[index]
        written.catch_up(self._gate.first(index).scores)
        meta: dict[str, Any] = {
            "id": self._ids[index],
            "finish_reason": _finish(output),
            "prompt_tokens": len(output.job.prompt),
            "weight_version": _WEIGHT_VERSION,
            "completion_tokens": len(output.tokens),
            "cached_tokens": min(output.cached_tokens, len(output.job.prompt)),
            "e2e_latency": time.monotonic() - self._began,
            **written.logprobs,
        }
        if output.timeline is not None and output.finish is not None:
            meta["timeline"] = output.timeline.as_json()
        told = {"text": written.text.json, "output_ids": written.ids.json, "meta_info": meta}
        return {**told, "prompt_token_ids": output.job.prompt} if self._prompt_ids else told


class _Written:
    """The parts of one output that every event of a stream repeats, each encoded only as it comes."""

    def __init__(self, output: SequenceOutput, described: Described | None, tokenizer: Tokenizer) -> None:
        self.text, self.ids = GrowingText(), GrowingList()
        self._output = output
        self._described = described
        self._tokenizer = tokenizer
        self._texts = 0
        self._own, self._tops, self._named = GrowingList(), GrowingList(), GrowingList()
        self._prompt: dict[str, msgspec.Raw] | None = None

    def catch_up(self, scores: ScoreLog | None) -> None:
        """Take what the output has got since last time; `scores` are the prompt's, complete at the first time."""
        output, described = self._output, self._described
        self.text.extend("".join(output.texts[self._texts :]))
        self._texts = len(output.texts)
        self.ids.extend(output.tokens[len(self.ids) :])
        if described is None:
            return
        if self._prompt is None:
            self._prompt = self._of_prompt(described, scores)
        new = output.events[len(self._own) :]
        self._own.extend([self._logprob(each.logprob, each.token) for each in new])
        self._tops.extend([[self._logprob(top.logprob, top.token) for top in each.top or ()] for each in new])
        self._named.extend([self._of_tokens(each.named or [], described) for each in new])

    @property
    def logprobs(self) -> dict[str, msgspec.Raw]:
        """Those parts of `meta_info` that were asked for."""
        if self._described is None:
            return {}
        found = {**(self._prompt or {}), "output_token_logprobs": self._own.json}
        if self._described.top:
            found["output_top_logprobs"] = self._tops.json
        if self._described.tokens:
            found["output_token_ids_logprobs"] = self._named.json
        return found

    def _of_prompt(self, described: Described, scores: ScoreLog | None) -> dict[str, msgspec.Raw]:
        """The prompt's tokens from `start_len` on; nothing is told of the first."""
        prompt, first = self._output.job.prompt, described.start_len
        own: list[_Logprob] = [self._logprob(None, prompt[first])]
        tops: list[list[_Logprob] | None] = [None]
        named: list[list[_Logprob] | None] = [None]
        for each in scores or ():
            own.append(self._logprob(each.logprob, prompt[each.position]))
            tops.append([self._logprob(logprob, token) for token, logprob in each.top])
            named.append(self._of_tokens(each.named, described))
        found = {"input_token_logprobs": msgspec.Raw(encode(own))}
        if described.top:
            found["input_top_logprobs"] = msgspec.Raw(encode(tops))
        if described.tokens:
            found["input_token_ids_logprobs"] = msgspec.Raw(encode(named))
        return found

    def _of_tokens(self, logprobs: Sequence[float], described: Described) -> list[_Logprob]:
        return [self._logprob(each, token) for each, token in zip(logprobs, described.tokens, strict=False)]

    def _logprob(self, logprob: float | None, token: int) -> _Logprob:
        with_text = self._described is not None and self._described.with_text
        return (logprob, token, self._tokenizer.token_text(token) if with_text else None)


def _finish(output: SequenceOutput) -> dict[str, Any] | None:
    if output.finish is None:
        return None
    if output.finish is FinishReason.LENGTH:
        return {"type": "length", "length": len(output.tokens)}
    if output.finish is FinishReason.ABORT:
        return {"type": "abort", "message": "aborted by /abort_request"}
    return {"type": "stop", "matched": output.tokens[-1] if output.matched is None else output.matched}
