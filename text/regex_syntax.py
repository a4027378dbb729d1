"""Regular expressions in Python's syntax, read into trees.

Only what is regular, and can be decided without looking ahead, has a tree; the rest is refused by name. Single
characters are tested by Python's own `re`, so classes, escapes and flags mean what they mean there.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

_MOST_DEPTH = 50
_SHOWN = 60
"""Characters of an expression."""
_FLAGS = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "u": re.UNICODE}
_REFUSED = {
    "(?=": "looks ahead",
    "(?!": "looks ahead",
    "(?<=": "looks behind",
    "(?<!": "looks behind",
    "(?>": "is an atomic group",
    "(?(": "is a condition",
    "(?#": "is a comment",
    "(?P=": "refers back",
}
_GROUP = re.compile(r"\((?:\?P<\w+>|\?:|(?!\?))")
_SCOPED = re.compile(r"\(\?([a-zA-Z]*)(?:-([a-zA-Z]+))?([:)])")
_CLASS = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)
_ESCAPE = re.compile(
    r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|0[0-7]{0,2}|[0-3][0-7]{2}|.)", re.DOTALL
)
_REPEATED = re.compile(r"[*+?]|\{(?=[0-9,])([0-9]*)(,?)([0-9]*)\}")


class BadRegex(ValueError):
    """This expression cannot be followed; the message says why."""


def shortened(regex: str) -> str:
    """An expression as messages quote it."""
    return repr(regex if len(regex) <= _SHOWN else regex[: _SHOWN - 3] + "...")


class Place(enum.Enum):
    """Where in a text one is, as far as `^` asks."""

    BEGINNING = "beginning"
    LINE = "line"
    ELSEWHERE = "elsewhere"


@dataclass(frozen=True, slots=True)
class One:
    """A character: this one, or one that matches."""

    takes: str | re.Pattern[str]


@dataclass(frozen=True, slots=True)
class At:
    """Nothing, but only at these places."""

    places: frozenset[Place]


@dataclass(frozen=True, slots=True)
class Row:
    """One after the other."""

    parts: Sequence[Tree]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of them."""

    options: Sequence[Tree]


@dataclass(frozen=True, slots=True)
class Repeat:
    """So many times; None is any number."""

    part: Tree
    least: int
    most: int | None


Tree = One | At | Row | Choice | Repeat


def read_regex(regex: str) -> Tree:
    """Raises `BadRegex`."""
    return _Reader(regex).tree()


class _Reader:
    """Reads one expression, of which `re` has said that it is one."""

    def __init__(self, regex: str) -> None:
        try:
            re.compile(regex)
        except (re.error, OverflowError, RecursionError) as error:
            raise BadRegex(f"{shortened(regex)} is no regular expression: {error}") from error
        self._regex = regex
        self._at = 0
        self._flags = re.RegexFlag(0)
        self._depth = 0

    def tree(self) -> Tree:
        return self._choice()

    def _choice(self) -> Tree:
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise BadRegex(f"{shortened(self._regex)} has more than {_MOST_DEPTH} groups within each other; have fewer")
        options = [self._sequence()]
        while self._regex.startswith("|", self._at):
            self._at += 1
            options.append(self._sequence())
        self._depth -= 1
        return options[0] if len(options) == 1 else Choice(options)

    def _sequence(self) -> Tree:
        parts = []
        while self._at < len(self._regex) and self._regex[self._at] not in "|)":
            parts.append(self._repeated(self._single()))
        return Row(parts)

    def _repeated(self, part: Tree) -> Tree:
        found = _REPEATED.match(self._regex, self._at)
        if found is None:
            return part
        self._at = found.end()
        follows = self._regex[self._at : self._at + 1]
        if follows == "+":
            raise self._refusal(found.group() + "+", "is possessive", at=found.start())
        if follows == "?":  # lazy or not, the first end counts
            self._at += 1
        if found.group() in ("*", "+", "?"):
            return Repeat(part, int(found.group() == "+"), 1 if found.group() == "?" else None)
        least, comma, most = found.groups()
        if not comma:
            return Repeat(part, int(least), int(least))
        return Repeat(part, int(least or 0), int(most) if most else None)

    def _single(self) -> Tree:
        character = self._regex[self._at]
        if character == "(":
            return self._group()
        if character == "^":
            self._at += 1
            return self._beginning(lines=bool(self._flags & re.MULTILINE))
        if character == "$":
            raise self._refusal("$", "asks what follows", at=self._at)
        if character == "\\":
            return self._escape()
        if character == "[":
            return self._one(self._took(_CLASS))
        self._at += 1
        if character == "." or self._flags & re.IGNORECASE:
            return self._one(character if character == "." else re.escape(character))
        return One(character)

    def _group(self) -> Tree:
        for begin, why in _REFUSED.items():
            if self._regex.startswith(begin, self._at):
                raise self._refusal(begin, why, at=self._at)
        outside = self._flags
        if scoped := _SCOPED.match(self._regex, self._at):
            more, less, end = scoped.groups()
            self._flags = (self._flags | self._named(more)) & ~self._named(less or "")
            self._at = scoped.end()
            if end == ")":
                return Row([])
        else:
            self._took(_GROUP)
        tree = self._choice()
        self._at += 1
        self._flags = outside
        return tree

    def _named(self, letters: str) -> re.RegexFlag:
        flags = re.RegexFlag(0)
        for letter in letters:
            if letter not in _FLAGS:
                raise self._refusal(letter, "is a flag that is not known here", at=self._at)
            flags |= _FLAGS[letter]
        return flags

    def _escape(self) -> Tree:
        at, escape = self._at, self._took(_ESCAPE)
        if escape == r"\A":
            return self._beginning(lines=False)
        if escape in (r"\Z", r"\z", r"\b", r"\B"):
            raise self._refusal(escape, "asks what follows", at=at)
        if len(escape) == 2 and escape[1] in "123456789":
            raise self._refusal(escape, "refers back", at=at)
        return self._one(escape)

    def _took(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._regex, self._at)
        assert found is not None, "re has compiled it"
        self._at = found.end()
        return found.group()

    def _one(self, regex: str) -> Tree:
        return One(re.compile(regex, self._flags))

    def _beginning(self, *, lines: bool) -> Tree:
        return At(frozenset({Place.BEGINNING, Place.LINE} if lines else {Place.BEGINNING}))

    def _refusal(self, part: str, why: str, *, at: int) -> BadRegex:
        return BadRegex(f"{shortened(self._regex)} has {part!r} at position {at}, which {why}; write it without")
