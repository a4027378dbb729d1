"""DeepSeek: V3 and R1 write `function`, the name and fenced JSON between their markers, V3.1 the name and bare JSON."""

from __future__ import annotations

from collections.abc import Collection

from text.tools.envelope import begin
from text.tools.source import NoCallError, Sink, Source, Steps, attempt

CALLS_BEGIN = "<｜tool▁calls▁begin｜>"  # noqa: RUF001 - the models' own characters
CALLS_END = "<｜tool▁calls▁end｜>"  # noqa: RUF001
CALL_BEGIN = "<｜tool▁call▁begin｜>"  # noqa: RUF001
CALL_END = "<｜tool▁call▁end｜>"  # noqa: RUF001
SEPARATOR = "<｜tool▁sep｜>"  # noqa: RUF001
KIND = "function"
FENCE = "```json\n"
FENCE_END = "\n```"


def read(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    while (marker := (yield from source.until(sink, (CALLS_BEGIN, CALL_BEGIN)))) is not None:
        reading = _first(source, sink, names) if marker == CALLS_BEGIN else _call(source, sink, names)
        yield from attempt(source, sink, marker, reading)


def _first(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    yield from source.space()
    yield from source.expect(CALL_BEGIN)
    yield from _call(source, sink, names)


def _call(source: Source, sink: Sink, names: Collection[str]) -> Steps[None]:
    yield from source.space()
    name = yield from _up_to(source, SEPARATOR)
    fenced = name == KIND
    if fenced:
        name = yield from _up_to(source, "\n")
        yield from source.expect(FENCE)
    if name.strip() not in names:
        raise NoCallError
    yield from source.space()
    if (yield from source.peek()) != "{":
        raise NoCallError
    begin(source, sink, name.strip())
    yield from source.arguments(sink)
    if fenced:
        yield from source.skip(FENCE_END.strip())
    yield from source.skip(CALL_END)
    yield from source.skip(CALLS_END)


def _up_to(source: Source, end: str) -> Steps[str]:
    taken = ""
    while not taken.endswith(end):
        if not (char := (yield from source.take())):
            raise NoCallError
        taken += char
    return taken[: -len(end)]
