"""Llama 3: bare `{"name": ..., "parameters": {...}}`, several with `;` between them, or, after `<|python_tag|>`,
`name.call(key=value)` as in Python."""

from __future__ import annotations

from collections.abc import Collection

from text.tools.envelope import envelope
from text.tools.python_call import python_call
from text.tools.source import Sink, Source, Steps, attempt

PYTHON_TAG = "<|python_tag|>"


def read(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    while (marker := (yield from source.until(sink, (PYTHON_TAG, "{")))) is not None:
        reading = _tagged(source, sink, names) if marker == PYTHON_TAG else objects(source, sink, names)
        yield from attempt(source, sink, marker, reading)


def objects(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    """What begins at the mark, with "{"."""
    source.back()
    yield from _list(source, sink, names)


def _tagged(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    """What follows the tag."""
    yield from source.space()
    if (yield from source.peek()) == "{":
        yield from _list(source, sink, names)
    else:
        yield from python_call(source, sink, names, suffix=".call")


def _list(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    yield from envelope(source, sink, names)
    while (yield from source.skip(";", settle=False)):
        yield from source.space()
        yield from envelope(source, sink, names)
