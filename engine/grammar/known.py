"""Compiled grammars and refusals by content; what is least recently used goes when all take too much.

Belongs to a `GrammarCache`, whose lock guards it.
"""

from __future__ import annotations

from collections import OrderedDict

from engine.grammar.compiled import CompiledGrammar
from engine.grammar.errors import GrammarRefused

Key = tuple[str, str]
"""Kind and text."""
Known = CompiledGrammar | GrammarRefused
_REFUSAL_BYTES = 4096
"""What a remembered refusal counts as, its text apart."""


class KnownGrammars:
    """At most `max_bytes` of them, or one that takes more."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._known: OrderedDict[Key, Known] = OrderedDict()

    def find(self, key: Key) -> Known | None:
        """What is known of it, which counts as a use."""
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
        return known

    def keep(self, key: Key, known: Known) -> None:
        """Remember a grammar that was not known."""
        self._known[key] = known
        self.num_bytes += _size(key, known)
        while self.num_bytes > self._max_bytes and len(self._known) > 1:
            self.num_bytes -= _size(*self._known.popitem(last=False))


def _size(key: Key, known: Known) -> int:
    text = 2 * len(key[1])
    return text + (known.num_bytes if isinstance(known, CompiledGrammar) else _REFUSAL_BYTES)
