"""Llama 4 and others: a list of Python calls, `[name(key=value), ...]`, or Llama 3's JSON, which some write too."""

from __future__ import annotations

from collections.abc import Collection

from text.tools.llama3 import objects
from text.tools.python_call import python_call
from text.tools.source import Sink, Source, Steps, attempt

START = "<|python_start|>"
END = "<|python_end|>"


def read(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    while (marker := (yield from source.until(sink, (START, "[", "{")))) is not None:
        reading = objects if marker == "{" else _listed if marker == "[" else _started
        yield from attempt(source, sink, marker, reading(source, sink, names))


def _started(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    yield from source.space()
    yield from source.expect("[")
    yield from _listed(source, sink, names)


def _listed(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    while True:
        yield from source.space()
        yield from python_call(source, sink, names)
        if not (yield from source.skip(",", settle=False)):
            break
    yield from source.skip("]")
    yield from source.skip(END)
