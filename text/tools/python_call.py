"""A call written as Python would, `name(key=value, ...)`, with literals as values, turned into JSON as they come."""

from __future__ import annotations

import ast
import json
import string
import warnings
from collections.abc import Collection

from text.tools.envelope import begin
from text.tools.source import NoCallError, Sink, Source, Steps

_NAME = frozenset(string.ascii_letters + string.digits + "_.-")
_KEY = frozenset(string.ascii_letters + string.digits + "_")
_CLOSERS = {"(": ")", "[": "]", "{": "}"}
_MAX_DEPTH = 64


def python_call(source: Source, sink: Sink, names: Collection[str], *, suffix: str = "") -> Steps[None]:
    """One call, of one of `names`, with or without `suffix`; each of its arguments is settled."""
    name = (yield from source.word(_NAME)).removesuffix(suffix)
    if name not in names:
        raise NoCallError
    yield from source.expect("(")
    begin(source, sink, name)
    keys: set[str] = set()
    while True:
        yield from source.space()
        if (yield from source.peek()) == ")":
            break
        key = yield from source.word(_KEY)
        if not key or key in keys:
            raise NoCallError
        yield from source.space()
        yield from source.expect("=")
        source.unbound()
        value = _as_json((yield from _literal(source)))
        sink.arguments(f"{', ' if keys else '{'}{json.dumps(key)}: {value}")
        keys.add(key)
        source.settle()
        if (yield from source.peek()) == ",":
            yield from source.take()
    yield from source.take()
    sink.arguments("}" if keys else "{}")
    source.settle()


def _literal(source: Source) -> Steps[str]:
    """The text up to the comma or parenthesis that ends an argument."""
    taken = ""
    closers: list[str] = []
    while True:
        char = yield from source.peek()
        if not char:
            raise NoCallError
        if char in ",)" and not closers:
            return taken
        if char in "\"'":
            taken += yield from _string(source)
            continue
        if char in _CLOSERS:
            closers.append(_CLOSERS[char])
        elif char in ")]}" and (not closers or closers.pop() != char):
            raise NoCallError
        if len(closers) > _MAX_DEPTH:
            raise NoCallError
        taken += yield from source.take()


def _string(source: Source) -> Steps[str]:
    quote = yield from source.take()
    end, taken = quote, quote
    if (yield from source.peek()) == quote:
        taken += yield from source.take()
        if (yield from source.peek()) != quote:
            return taken
        taken += yield from source.take()
        end = 3 * quote
    start = len(taken)
    while len(taken) < start + len(end) or not taken.endswith(end):
        char = yield from source.take()
        if char == "\\":
            char += yield from source.take()
            # An escaped quote must not be taken for the end.
            taken, start = taken + char, len(taken) + len(char)
            continue
        if not char:
            raise NoCallError
        taken += char
    return taken


def _as_json(literal: str) -> str:
    """JSON of a Python literal, or of JSON's own words for true, false and null."""
    text = literal.strip()
    try:
        if text in ("true", "false", "null"):
            return text
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string is what a model writes
            value = ast.literal_eval(text)
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
        written.encode()  # half a surrogate pair is no text
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise NoCallError from error
    return written
