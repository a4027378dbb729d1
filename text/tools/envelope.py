"""A call as a JSON object with a name and arguments, which most families write somehow."""

from __future__ import annotations

from collections.abc import Collection

from text.tools.source import NoCallError, Sink, Source, Steps

_ARGUMENTS = ("arguments", "parameters")
_ASIDE = ("type", "id")
"""Members that some models add; their values must be strings."""


def begin(source: Source, sink: Sink, name: str) -> None:
    """From here on it is a call, whatever follows."""
    sink.call(name)
    source.settle()


def envelope(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    """`{"name": ..., "arguments": {...}}`, for one of `names`; what was read is settled at the end."""
    name, held, told = None, None, False
    seen: set[str] = set()
    yield from source.expect("{")
    while True:
        yield from source.space()
        key = yield from source.string()
        yield from source.space()
        yield from source.expect(":")
        yield from source.space()
        if key in seen or (key in _ARGUMENTS and not seen.isdisjoint(_ARGUMENTS)):
            raise NoCallError
        seen.add(key)
        if key == "name":
            name = yield from source.string()
            if name not in names:
                raise NoCallError
            if held is not None:
                begin(source, sink, name)
                sink.arguments(held)
                told = True
        elif key in _ARGUMENTS and (yield from source.peek()) == "n":
            yield from source.expect("null")
        elif key in _ARGUMENTS and name is None:
            held = yield from source.json()
            if not held.startswith("{"):
                raise NoCallError
        elif key in _ARGUMENTS:
            assert name is not None
            if (yield from source.peek()) != "{":
                raise NoCallError
            begin(source, sink, name)
            told = True
            yield from source.arguments(sink)
        elif key in _ASIDE:
            yield from source.string()
        else:
            raise NoCallError
        yield from source.space()
        if (yield from source.peek()) == "}":
            break
        yield from source.expect(",")
    if name is None:
        raise NoCallError
    yield from source.take()
    if not told:
        begin(source, sink, name)
        sink.arguments("{}")
    source.settle()
