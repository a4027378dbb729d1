"""Mistral: `[TOOL_CALLS]` and a list of JSON objects or, in newer models, a name, `[ARGS]` and the arguments."""

from __future__ import annotations

import string
from collections.abc import Collection

from text.tools.envelope import begin, envelope
from text.tools.source import NoCallError, Sink, Source, Steps, attempt

BEGIN = "[TOOL_CALLS]"
ARGS = "[ARGS]"
CALL_ID = "[CALL_ID]"
_NAME = frozenset(string.ascii_letters + string.digits + "_-.")


def read(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    while (yield from source.until(sink, (BEGIN,))) is not None:
        yield from attempt(source, sink, BEGIN, _calls(source, sink, names))


def _calls(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    yield from source.space()
    first = yield from source.peek()
    if first == "{":
        yield from envelope(source, sink, names)
    elif first == "[":
        yield from source.take()
        yield from _listed(source, sink, names)
    else:
        yield from _named(source, sink, names)


def _listed(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    while True:
        yield from source.space()
        yield from envelope(source, sink, names)
        if not (yield from source.skip(",", settle=False)):
            break
    yield from source.skip("]")


def _named(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    name = yield from source.word(_NAME)
    if name not in names:
        raise NoCallError
    if (yield from source.peek()) == "[":
        yield from source.take()
        kind = yield from source.peek()
        if kind == CALL_ID[1]:
            yield from source.expect(CALL_ID[1:])
            yield from source.word(_NAME)
            yield from source.expect(ARGS)
        else:
            yield from source.expect(ARGS[1:])
    yield from source.space()
    if (yield from source.peek()) != "{":
        raise NoCallError
    begin(source, sink, name)
    yield from source.arguments(sink)
