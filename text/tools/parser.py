"""Finds the calls in one output, however it is cut into pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Protocol

from text.message_events import Event, merged
from text.tools.source import Sink, Source, Steps

_BLOCK = 512
"""Characters read at a time: a parser may go over what it has before it again and again."""


class Read(Protocol):
    """How a family's calls are read: a generator that runs to the end of the text."""

    def __call__(self, source: Source, sink: Sink, names: Collection[str]) -> Steps[None]: ...


class ToolParser:
    """Feed the text as it comes, then `finish`. It never raises: what is no call of one of `names` is content.

    A call begins once its name and the start of its arguments are clear. What was streamed of it stays when the rest
    turns out to be broken or missing, and the rest is content.
    """

    def __init__(self, read: Read, names: Collection[str]) -> None:
        self._source = Source()
        self._sink = Sink()
        self._steps = read(self._source, self._sink, names)

    def feed(self, text: str) -> list[Event]:
        """What the next piece of text settles."""
        for start in range(0, len(text), _BLOCK):
            self._source.append(text[start : start + _BLOCK])
            next(self._steps)
        events = self._sink.drain()
        return merged(events) if len(events) > 1 else events

    def finish(self) -> list[Event]:
        """What was held back, now that no more text follows; once, at the end."""
        self._source.end()
        with contextlib.suppress(StopIteration):
            next(self._steps)
        self._sink.close()
        return merged(self._sink.drain())
