"""What every API's way of answering has in common: its interface, server-sent events, usage, finish reasons."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from protocol.rooms import TokenEvent
from protocol.sampling import FinishReason
from router.work import Delta, SequenceOutput, Work
from text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"

FINISH_WORDS = {
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


class ResponseFormat(Protocol):
    """Writes one response, as a stream of server-sent events or whole. Made for one request, used once."""

    def opening(self) -> bytes:
        """What precedes the first piece of a stream; may be empty."""
        ...

    def piece(self, index: int, delta: Delta) -> bytes:
        """The events for some new tokens of one sequence; may be empty while their text is held back."""
        ...

    def closing(self) -> bytes:
        """The end of a stream in which every sequence has finished."""
        ...

    def whole(self) -> bytes:
        """The body of a response that is not streamed, once every sequence has finished."""
        ...


def encode(value: object) -> bytes:
    """`value` as JSON."""
    return msgspec.json.encode(value)


def event(value: object) -> bytes:
    """One server-sent event holding `value` as JSON."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class Splice:
    """A chunk encoded once, into which each piece of text is put without encoding the rest again."""

    def __init__(self, chunk: Callable[[str], object]) -> None:
        """`chunk(text)` is the chunk whose text is `text`, which it holds exactly once."""
        mark = secrets.token_hex(16)
        self._head, self._tail = event(chunk(mark)).split(b'"' + mark.encode() + b'"')

    def __call__(self, text: str) -> bytes:
        return self._head + msgspec.json.encode(text) + self._tail


def usage(work: Work, outputs: Sequence[SequenceOutput]) -> dict[str, Any]:
    """OpenAI's usage object; each prompt counts once, whatever its number of choices."""
    prompt = work.prompt_tokens
    completion = sum(len(output.tokens) for output in outputs)
    cached = sum(min(output.cached_tokens, len(output.job.prompt)) for output in outputs[:: work.choices])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def chat_logprobs(tokenizer: Tokenizer, events: Sequence[TokenEvent]) -> dict[str, Any]:
    """OpenAI's `logprobs` of a chat choice."""
    content = []
    for each in events:
        entry = _chat_logprob(tokenizer, each.token, each.logprob)
        entry["top_logprobs"] = [_chat_logprob(tokenizer, top.token, top.logprob) for top in each.top or ()]
        content.append(msgspec.Raw(encode(entry)))  # a fifth of what the objects of a long answer would take
    return {"content": content, "refusal": None}


def _chat_logprob(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    raw = tokenizer.bytes_of(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}
