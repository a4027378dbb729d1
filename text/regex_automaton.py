"""Regular expressions in Python's syntax as automata, which read a text once and never go back.

Only what is regular, and can be decided without looking ahead, becomes one; the rest is refused by name. Single
characters are tested by Python's own `re`, so classes, escapes and flags mean what they mean there.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MOST_NODES = 256
"""Most of them can be under way at once: a character then takes a tenth of a millisecond."""
_MOST_DEPTH = 50
_FLAGS = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "u": re.UNICODE}
_NO_AUTOMATON = {
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
    """This expression cannot become an automaton; the message says why."""


class Place(enum.Enum):
    """Where in a text one is, as far as `^` asks."""

    BEGINNING = "beginning"
    LINE = "line"
    ELSEWHERE = "elsewhere"


@dataclass(frozen=True, slots=True)
class Node:
    """Takes a character, if it says which, and goes on to any of `to`; passes only `at` some places, if it says so."""

    to: tuple[int, ...]
    takes: str | re.Pattern[str] | None = None
    at: frozenset[Place] | None = None
    ends: int | None = None
    """The expression that has matched here."""

    def takes_character(self, character: str) -> bool:
        if isinstance(self.takes, str):
            return self.takes == character
        return self.takes is not None and self.takes.fullmatch(character) is not None


class Automaton:
    """Several texts and expressions at once, numbered in this order."""

    def __init__(self, texts: Sequence[str], regexes: Sequence[str]) -> None:
        """Raises `BadRegex` for an expression that is none, matches the empty text or has no automaton, and for more
        than 256 parts in all."""
        self.nodes: list[Node] = []
        trees: list[_Tree] = [_Sequence([_One(character) for character in text]) for text in texts]
        trees += [_Reader(regex).tree() for regex in regexes]
        self._starts = tuple(self._build(tree, self._add(Node((), ends=number))) for number, tree in enumerate(trees))
        for regex, start in zip(regexes, self._starts[len(texts) :], strict=True):
            if any(self.nodes[each].ends is not None for place in Place for each in self._from([start], place)):
                raise BadRegex(f"{regex!r} matches the empty text, which is everywhere; have it match a character")

    def begun(self, place: Place) -> list[int]:
        """The nodes at which a match begins that begins at such a place."""
        return self._from(self._starts, place)

    def after(self, nodes: Iterable[int], character: str) -> list[int]:
        """The nodes at which those that take this character arrive, in order, each once."""
        to = [each for node in nodes if self.nodes[node].takes_character(character) for each in self.nodes[node].to]
        return self._from(to, Place.LINE if character == "\n" else Place.ELSEWHERE)

    def _from(self, nodes: Iterable[int], place: Place) -> list[int]:
        """The nodes that take a character or end a match, as far as one comes without taking any."""
        found: list[int] = []
        seen: set[int] = set()
        pending = list(nodes)[::-1]
        while pending:
            number = pending.pop()
            node = self.nodes[number]
            if number in seen or (node.at is not None and place not in node.at):
                continue
            seen.add(number)
            if node.takes is not None or node.ends is not None:
                found.append(number)
            else:
                pending.extend(node.to[::-1])
        return found

    def _add(self, node: Node) -> int:
        if len(self.nodes) >= _MOST_NODES:
            raise BadRegex(f"they have more than {_MOST_NODES} parts with their repetitions; make them shorter")
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _build(self, tree: _Tree, then: int) -> int:
        """Nodes for a tree, after which it goes on at `then`; returns where they begin."""
        if isinstance(tree, _One):
            return self._add(Node((then,), takes=tree.takes))
        if isinstance(tree, _At):
            return self._add(Node((then,), at=tree.places))
        if isinstance(tree, _Choice):
            return self._add(Node(tuple(self._build(each, then) for each in tree.options)))
        if isinstance(tree, _Sequence):
            for each in reversed(tree.parts):
                then = self._build(each, then)
            return self._add(Node((then,)))  # also for nothing: whatever is repeated counts
        if tree.most is None:
            loop = self._add(Node(()))
            self.nodes[loop] = Node((self._build(tree.part, loop), then))
            entry = loop
        else:
            entry = then
            for _ in range(tree.most - tree.least):
                entry = self._add(Node((self._build(tree.part, entry), then)))
        for _ in range(tree.least):
            entry = self._build(tree.part, entry)
        return entry


@dataclass(frozen=True, slots=True)
class _One:
    takes: str | re.Pattern[str]


@dataclass(frozen=True, slots=True)
class _At:
    places: frozenset[Place]


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: Sequence[_Tree]


@dataclass(frozen=True, slots=True)
class _Choice:
    options: Sequence[_Tree]


@dataclass(frozen=True, slots=True)
class _Repeat:
    part: _Tree
    least: int
    most: int | None


_Tree = _One | _At | _Sequence | _Choice | _Repeat


class _Reader:
    """Reads one expression, of which `re` has said that it is one."""

    def __init__(self, regex: str) -> None:
        try:
            re.compile(regex)
        except (re.error, OverflowError, RecursionError) as error:
            raise BadRegex(f"{regex!r} is no regular expression: {error}") from error
        self._regex = regex
        self._at = 0
        self._flags = re.RegexFlag(0)
        self._depth = 0

    def tree(self) -> _Tree:
        return self._choice()

    def _choice(self) -> _Tree:
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise BadRegex(f"{self._regex!r} has more than {_MOST_DEPTH} groups within each other; have fewer")
        options = [self._sequence()]
        while self._regex.startswith("|", self._at):
            self._at += 1
            options.append(self._sequence())
        self._depth -= 1
        return options[0] if len(options) == 1 else _Choice(options)

    def _sequence(self) -> _Tree:
        parts = []
        while self._at < len(self._regex) and self._regex[self._at] not in "|)":
            parts.append(self._repeated(self._single()))
        return _Sequence(parts)

    def _repeated(self, part: _Tree) -> _Tree:
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
            return _Repeat(part, int(found.group() == "+"), 1 if found.group() == "?" else None)
        least, comma, most = found.groups()
        if not comma:
            return _Repeat(part, int(least), int(least))
        return _Repeat(part, int(least or 0), int(most) if most else None)

    def _single(self) -> _Tree:
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
        return _One(character)

    def _group(self) -> _Tree:
        for begin, why in _NO_AUTOMATON.items():
            if self._regex.startswith(begin, self._at):
                raise self._refusal(begin, why, at=self._at)
        outside = self._flags
        if scoped := _SCOPED.match(self._regex, self._at):
            more, less, end = scoped.groups()
            self._flags = (self._flags | self._named(more)) & ~self._named(less or "")
            self._at = scoped.end()
            if end == ")":
                return _Sequence([])
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

    def _escape(self) -> _Tree:
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

    def _one(self, regex: str) -> _Tree:
        return _One(re.compile(regex, self._flags))

    def _beginning(self, *, lines: bool) -> _Tree:
        return _At(frozenset({Place.BEGINNING, Place.LINE} if lines else {Place.BEGINNING}))

    def _refusal(self, part: str, why: str, *, at: int) -> BadRegex:
        return BadRegex(f"{self._regex!r} has {part!r} at position {at}, which {why}; write it without")
