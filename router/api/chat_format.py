"""Writes chat completions and their chunks.

Each choice's text goes through a `MessageReader` of its own, by pieces when streamed and at once when not, with the
same result.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.sampling import FinishReason
from router.api.completion_logprobs import prompt_logprobs
from router.api.openai import OpenAIFrame, StreamOptions
from router.api.prompts import ModelText
from router.api.response import FINISH_WORDS, Splice, chat_logprobs, event
from router.work import Delta, SequenceOutput, Work
from text.message import MessageReader
from text.message_events import CallArguments, CallStart, Content, Event, Reasoning, merged

_STOPS = (FinishReason.STOP_TOKEN, FinishReason.STOP_STRING)


@dataclass(frozen=True, kw_only=True)
class ChatStyle:
    """What a request wants to see of its output."""

    logprobs: bool
    token_ids: bool
    prompt_logprobs: int | None
    """So many of the likeliest tokens at each position of the prompt; None: nothing of the prompt."""
    reasons: bool
    """Reasoning is told from the answer."""
    reasoning: bool
    """Show what the model thought; else it is left out."""
    echoed: str
    """What every message begins with: the text that the output continues, if it is wanted."""
    stream_options: StreamOptions
    may_call: bool
    """Tools may be called: a message of nothing but calls has no content, not even an empty one."""
    short_call_ids: bool
    make_reader: Callable[[], MessageReader]


class _Choice:
    """One choice's way from text to message."""

    def __init__(self, index: int, output: SequenceOutput, style: ChatStyle, token: str) -> None:
        self.output = output
        self.reader = style.make_reader()
        self.calls = 0
        self.said = False
        """Some content was sent."""
        self.sent_tokens = 0
        self._seed = f"{token}/{index}"
        self._short = style.short_call_ids

    def begin_call(self, name: str) -> dict[str, Any]:
        """What comes first of a call: everything but its arguments."""
        digest = hashlib.blake2b(f"{self._seed}/{self.calls}".encode(), digest_size=12).hexdigest()
        self.calls += 1
        # The ids follow from the request, so that a stream that is taken up again has the same ones.
        id_ = digest[:9] if self._short else f"call_{digest}"
        return {"id": id_, "type": "function", "function": {"name": name, "arguments": ""}}

    def ending(self) -> dict[str, Any]:
        finish = self.output.finish
        assert finish is not None
        word = "tool_calls" if self.calls and finish in _STOPS else FINISH_WORDS[finish]
        return {"finish_reason": word, "matched_stop": self.output.matched}


class ChatFormat:
    """A `ResponseFormat`."""

    def __init__(self, work: Work, outputs: Sequence[SequenceOutput], style: ChatStyle, *, model: ModelText) -> None:
        self._work = work
        self._style = style
        self._tokenizer = model.tokenizer
        self._choices = [_Choice(index, output, style, model.stamp.token) for index, output in enumerate(outputs)]
        self._frame = OpenAIFrame(
            work,
            outputs,
            kind="chat.completion.chunk" if work.stream else "chat.completion",
            model=model,
            stream_options=style.stream_options,
            reasoning_tokens=self._reasoning_tokens if style.reasons else None,
        )
        self._splices: dict[tuple[int, str], Splice] = {}

    def opening(self) -> bytes:
        written = b""
        for index in range(len(self._choices)):
            silent = self._style.may_call and not self._style.echoed
            begun = {"role": "assistant"} if silent else {"role": "assistant", "content": self._style.echoed}
            self._choices[index].said = not silent
            chunk = self._chunk(index, begun)
            if self._style.token_ids:
                chunk["prompt_token_ids"] = self._prompt_of(index)
            written += event(chunk)
        return written

    def piece(self, index: int, delta: Delta) -> bytes:
        choice = self._choices[index]
        events = choice.reader.feed(delta.text)
        if delta.finish is not None:
            events = merged([*events, *choice.reader.finish()])
        extras = self._extras(choice, delta)
        written = b""
        for each in events:
            if isinstance(each, Reasoning) and not self._style.reasoning:
                continue
            choice.said |= isinstance(each, Content)
            if not (extras or self._frame.tells_usage) and isinstance(each, Content | Reasoning):
                written += self._spliced(index, each)
            else:
                written += event(self._chunk(index, _change(each, choice), extras=extras))
                extras = {}
        if extras:
            written += event(self._chunk(index, {}, extras=extras))
        if delta.finish is not None:
            rest = {} if choice.said or choice.calls else {"content": ""}
            written += event(self._chunk(index, rest, ending=choice.ending()))
        return written

    def closing(self) -> bytes:
        return self._frame.closing()

    def whole(self) -> bytes:
        choices = []
        for index, choice in enumerate(self._choices):
            output = choice.output
            message = self._message(choice, merged([*choice.reader.feed(output.text), *choice.reader.finish()]))
            logprobs = chat_logprobs(self._tokenizer, output.events) if self._style.logprobs else None
            told = {"token_ids": output.tokens} if self._style.token_ids else {}
            choices.append({"index": index, "message": message, "logprobs": logprobs, **choice.ending(), **told})
        return self._frame.whole(choices, **self._of_prompt())

    def _of_prompt(self) -> dict[str, Any]:
        """What stands beside the choices."""
        told: dict[str, Any] = {"prompt_token_ids": self._prompt_of(0)} if self._style.token_ids else {}
        top, scores = self._style.prompt_logprobs, self._choices[0].output.scores
        if top is not None and scores is not None:
            told["prompt_logprobs"] = prompt_logprobs(self._tokenizer, self._prompt_of(0), scores, top=top)
        return told

    def _message(self, choice: _Choice, events: Sequence[Event]) -> dict[str, Any]:
        content, reasoning = self._style.echoed, ""
        calls: list[dict[str, Any]] = []
        for each in events:
            if isinstance(each, Content):
                content += each.text
            elif isinstance(each, Reasoning):
                reasoning += each.text
            elif isinstance(each, CallStart):
                calls.append(choice.begin_call(each.name))
            else:
                calls[-1]["function"]["arguments"] += each.text
        said = None if calls and not content else content
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if reasoning and self._style.reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def _extras(self, choice: _Choice, delta: Delta) -> dict[str, Any]:
        """What the first chunk with these tokens says about them."""
        extras: dict[str, Any] = {}
        if self._style.logprobs and delta.events:
            extras["logprobs"] = chat_logprobs(self._tokenizer, delta.events)
        if self._style.token_ids:
            extras["token_ids"] = choice.output.tokens[choice.sent_tokens :]
            choice.sent_tokens = len(choice.output.tokens)
        return extras

    def _spliced(self, index: int, text: Content | Reasoning) -> bytes:
        """A chunk with nothing but a text, of which there are thousands in a stream."""
        kind = "content" if isinstance(text, Content) else "reasoning_content"
        splice = self._splices.get((index, kind))
        if splice is None:
            splice = Splice(functools.partial(self._text_chunk, index, kind))
            self._splices[index, kind] = splice
        return splice(text.text)

    def _text_chunk(self, index: int, kind: str, text: str) -> dict[str, Any]:
        return self._chunk(index, {kind: text})

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        extras: dict[str, Any] | None = None,
        ending: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, **(ending or {"finish_reason": None})}
        return self._frame.chunk({**choice, **(extras or {})})

    def _reasoning_tokens(self) -> int:
        return sum(choice.output.tokens_within(choice.reader.thought) for choice in self._choices)

    def _prompt_of(self, index: int) -> list[int]:
        return self._work.jobs[index].prompt


def _change(each: Event, choice: _Choice) -> dict[str, Any]:
    """One event as a delta of the message."""
    if isinstance(each, Content):
        return {"content": each.text}
    if isinstance(each, Reasoning):
        return {"reasoning_content": each.text}
    if isinstance(each, CallStart):
        begun = choice.begin_call(each.name)
        return {"tool_calls": [{"index": choice.calls - 1, **begun}]}
    assert isinstance(each, CallArguments)
    return {"tool_calls": [{"index": choice.calls - 1, "function": {"arguments": each.text}}]}
