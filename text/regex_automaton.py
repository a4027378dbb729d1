"""Regular expressions as automata, which read a text once and never go back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from text.regex_syntax import At, BadRegex, Choice, One, Place, Row, Tree, read_regex, shortened

_MOST_NODES = 256
"""Most of them can be under way at once: a character then takes a tenth of a millisecond."""


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
        trees: list[Tree] = [Row([One(character) for character in text]) for text in texts]
        trees += [read_regex(regex) for regex in regexes]
        self._starts = tuple(self._build(tree, self._add(Node((), ends=number))) for number, tree in enumerate(trees))
        for regex, start in zip(regexes, self._starts[len(texts) :], strict=True):
            if any(self.nodes[each].ends is not None for place in Place for each in self._from([start], place)):
                raise BadRegex(
                    f"{shortened(regex)} matches the empty text, which is everywhere; have it match a character"
                )

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
            raise BadRegex(
                f"the expressions and the stop strings beside them have more than {_MOST_NODES} parts, each repetition "
                "counted; make them shorter"
            )
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _build(self, tree: Tree, then: int) -> int:
        """Nodes for a tree, after which it goes on at `then`; returns where they begin."""
        if isinstance(tree, One):
            return self._add(Node((then,), takes=tree.takes))
        if isinstance(tree, At):
            return self._add(Node((then,), at=tree.places))
        if isinstance(tree, Choice):
            return self._add(Node(tuple(self._build(each, then) for each in tree.options)))
        if isinstance(tree, Row):
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
