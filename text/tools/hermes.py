"""Hermes, Qwen and their many followers: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from collections.abc import Collection

from text.tools.envelope import envelope
from text.tools.source import Sink, Source, Steps, attempt

BEGIN = "<tool_call>"
END = "</tool_call>"


def read(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    while (yield from source.until(sink, (BEGIN,))) is not None:
        yield from attempt(source, sink, BEGIN, _call(source, sink, names))


def _call(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    yield from source.space()
    yield from envelope(source, sink, names)
    yield from source.skip(END)
