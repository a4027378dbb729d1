"""Generated text as parsers read it: as if all of it were there, though it comes in pieces.

Parsers are generators over a `Source`, written as if the whole text were there: they yield where they need more of it.
So they cannot depend on where it was cut. A `Sink` takes what they find.

The source has a *mark*: text before it is settled and forgotten, text after it can still turn out to be no call.
`NoCallError` says that it is none, and reading goes on at the mark. A parser may look `MAX_AHEAD` characters beyond the
mark before it settles, so that a hostile text cannot make it read the same again and again, or hold much back.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import TypeVar

from text.message_events import CallArguments, CallStart, Content, Event
from text.tools.json_scanner import JsonScanner

Result = TypeVar("Result")
Steps = Generator[None, None, Result]
"""Yields whenever all the text that there is has been read."""

MAX_AHEAD = 1024
_SPACE = " \t\n\r"


class NoCallError(Exception):
    """The text since the mark is no call."""


class Source:
    """One output's text, read once from its start to its end."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._bounded = True
        self._ended = False

    # ---- the driver's side --------------------------------------------------------------------------------------

    def append(self, text: str) -> None:
        self._text += text

    def end(self) -> None:
        """No more text follows."""
        self._ended = True

    # ---- the parser's side --------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Put the mark here: what was read stays read."""
        self._text = self._text[self._at :]
        self._at = 0
        self._bounded = True

    def unbound(self) -> None:
        """Any length may be read before the next mark."""
        self._bounded = False

    def back(self) -> None:
        """Go on at the mark."""
        self._at = 0

    def until(self, sink: Sink, markers: tuple[str, ...]) -> Steps[str | None]:
        """Everything up to one of `markers` is content. Returns that marker, the mark before it; None at the end."""
        starts = {marker[0] for marker in markers}
        while True:
            if starts.isdisjoint(self._text):  # as nearly every piece of a text is
                sink.content(self._text)
                self._at = len(self._text)
                self.settle()
                if self._ended:
                    return None
                yield
                continue
            found = [(place, -len(marker), marker) for marker in markers if (place := self._text.find(marker)) >= 0]
            if found:
                place, _, marker = min(found)
                sink.content(self._text[:place])
                self._at = place
                self.settle()
                self._at = len(marker)
                return marker
            kept = 0 if self._ended else _possible_start(self._text, markers)
            self._at = len(self._text) - kept
            sink.content(self._text[: self._at])
            self.settle()
            if self._ended:
                return None
            yield

    def peek(self) -> Steps[str]:
        """The next character, or "" at the end."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        if self._bounded and self._at > MAX_AHEAD:
            raise NoCallError
        return self._text[self._at]

    def take(self) -> Steps[str]:
        """The next character, which is read by that."""
        char = yield from self.peek()
        self._at += len(char)
        return char

    def space(self) -> Steps[None]:
        while (char := (yield from self.peek())) and char in _SPACE:
            self._at += 1

    def expect(self, literal: str) -> Steps[None]:
        for wanted in literal:
            if (yield from self.take()) != wanted:
                raise NoCallError

    def skip(self, literal: str, *, settle: bool = True) -> Steps[bool]:
        """Read `literal` with the space before it, if it comes next; else stay, which must be at the mark."""
        assert self._at == 0
        try:
            yield from self.space()
            yield from self.expect(literal)
        except NoCallError:
            self.back()
            return False
        if settle:
            self.settle()
        return True

    def word(self, characters: frozenset[str]) -> Steps[str]:
        """As many of `characters` as follow."""
        taken = ""
        while (char := (yield from self.peek())) and char in characters:
            taken += char
            self._at += 1
        return taken

    def json(self) -> Steps[str]:
        """A JSON value as it is written, within the bound."""
        scanner, taken = JsonScanner(), ""
        while not scanner.done:
            yield from self.peek()
            taken += self._scan(scanner)
            if self._bounded and self._at > MAX_AHEAD:
                raise NoCallError
        return taken

    def string(self) -> Steps[str]:
        """What a JSON string says."""
        if (yield from self.peek()) != '"':
            raise NoCallError
        raw = yield from self.json()
        value: str = json.loads(raw)
        return value

    def arguments(self, sink: Sink) -> Steps[None]:
        """A JSON object, handed on as it comes; each piece of it is settled."""
        scanner = JsonScanner()
        if (yield from self.peek()) != "{":
            raise NoCallError
        while not scanner.done:
            if not (yield from self.peek()):
                raise NoCallError
            sink.arguments(self._scan(scanner, settle=True))
            if scanner.failed:
                raise NoCallError

    def _scan(self, scanner: JsonScanner, *, settle: bool = False) -> str:
        start, self._at = self._at, scanner.scan(self._text, self._at)
        taken = self._text[start : self._at]
        if settle:
            self.settle()
        elif scanner.failed or not (taken or scanner.done):
            raise NoCallError
        return taken


class Sink:
    """Collects what a parser finds. Space alone before, between and after calls is layout, and no content."""

    def __init__(self) -> None:
        self.calls = 0
        self._events: list[Event] = []
        self._layout = ""
        self._only_layout = True

    def content(self, text: str) -> None:
        if not text:
            return
        if self._only_layout:
            self._layout += text
            if not self._layout.strip():
                return
            text, self._layout, self._only_layout = self._layout, "", False
        self._events.append(Content(text))

    def call(self, name: str) -> None:
        self.calls += 1
        self._layout, self._only_layout = "", True
        self._events.append(CallStart(name))

    def arguments(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(text))

    def close(self) -> None:
        """The text has ended: space without any call was content."""
        if self._layout and not self.calls:
            self._events.append(Content(self._layout))
            self._layout = ""

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def attempt(source: Source, sink: Sink, marker: str, call: Steps[None]) -> Steps[None]:
    """Run `call`, the reading of what follows `marker`. Where that is none, the marker is content and what follows it
    is read anew; once a call has begun, only what was not understood is."""
    before = sink.calls
    try:
        yield from call
    except NoCallError:
        source.back()
        if sink.calls == before:
            yield from source.expect(marker)
            sink.content(marker)
    source.settle()


def _possible_start(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a marker begins with."""
    for length in range(min(len(text), max(map(len, markers)) - 1), 0, -1):
        end = text[len(text) - length :]
        if any(marker.startswith(end) for marker in markers):
            return length
    return 0
