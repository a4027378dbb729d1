"""Regular expressions that end a text: found however it is cut into pieces, and never shown even in part.

A match counts as soon as it is there: the one that ends first, of those that end together the longest. Text in which
one could have begun is held back until it is clear; an expression such as `a.*b` holds back all that follows an a.
"""

from __future__ import annotations

from collections.abc import Sequence

from text.regex_automaton import Automaton
from text.regex_syntax import Place

_Groups = tuple[tuple[int, ...], ...]
"""Nodes by where the match began that may be there, oldest first; each node once."""
_MOST_KNOWN = 256
"""Steps, of up to some kilobytes each."""


class _Step:
    """What one character does: the groups after it, for each its place among those before it (the one past them is a
    match that begins with the character), and a match that ends: its place among those before, and its number."""

    def __init__(self, groups: _Groups, origins: tuple[int, ...], end: tuple[int, int] | None) -> None:
        self.groups = groups
        self.origins = origins
        self.end = end


class StopRegexMatcher:
    """Watches one text for the first match of several expressions, and for stop strings. As `StopStringMatcher`."""

    def __init__(self, stops: Sequence[str], regexes: Sequence[str]) -> None:
        """Raises `BadRegex`, or ValueError for an empty stop string."""
        if "" in stops:
            raise ValueError("a stop string is empty; give at least one character, or no stop string at all")
        self._automaton = Automaton(stops, regexes)
        self._names = (*stops, *regexes)
        self._known: dict[tuple[_Groups, Place, str], _Step] = {}
        """Steps worked out before: texts take the same ones again and again."""
        self._groups: _Groups = ()
        self._begun: list[int] = []
        """Where the matches of each group begin, counted from the beginning of the text."""
        self._place = Place.BEGINNING
        self._position = 0
        self._held = ""
        self.matched: str | None = None
        self.ending = ""

    def skip(self, text: str) -> None:
        """Text that no match may be in, but that comes before what is pushed."""
        if text:
            self._position += len(text)
            self._place = _place_after(text[-1])

    def push(self, text: str) -> tuple[str, str | None]:
        """(what to show, the expression or string that was reached or None); after a match everything is dropped."""
        if self.matched is not None:
            return "", self.matched
        buffer = self._held + text
        first = self._position - len(self._held)
        for character in text:
            step = self._step(character)
            begun = [*self._begun, self._position]
            self._position += 1
            if step.end is not None:
                origin, number = step.end
                self.matched, self._held = self._names[number], ""
                begin = begun[origin] - first
                self.ending = buffer[begin : self._position - first]
                return buffer[:begin], self.matched
            self._groups, self._begun = step.groups, [begun[origin] for origin in step.origins]
            self._place = _place_after(character)
        kept = (self._begun[0] if self._begun else self._position) - first
        self._held = buffer[kept:]
        return buffer[:kept], None

    def flush(self) -> str:
        """What was held back, now that no more text follows."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> _Step:
        key = (self._groups, self._place, character)
        step = self._known.get(key)
        if step is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            step = self._known[key] = self._worked_out(character)
        return step

    def _worked_out(self, character: str) -> _Step:
        nodes = self._automaton.nodes
        groups, origins = [], []
        seen: set[int] = set()
        for origin, group in enumerate((*self._groups, self._automaton.begun(self._place))):
            after = [node for node in self._automaton.after(group, character) if node not in seen]
            ends = [end for node in after if (end := nodes[node].ends) is not None]
            if ends:
                return _Step((), (), (origin, min(ends)))
            if after:
                seen.update(after)
                groups.append(tuple(after))
                origins.append(origin)
        return _Step(tuple(groups), tuple(origins), None)


def _place_after(character: str) -> Place:
    return Place.LINE if character == "\n" else Place.ELSEWHERE
