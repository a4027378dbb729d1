"""One sequence's place in its grammar.

A `Constraint` is made for a request before it enters the engine, from the tokens generated so far, and lives as long
as the request does, through preemptions and hand-overs of its KV. The engine thread tells it each token; the thread
of `MaskFiller` reads it between two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.grammar.compiled import CompiledGrammar


class GrammarMismatch(ValueError):
    """A generated token cannot stand where it does: somewhere a mask was wrong or not applied."""


class Constraint:
    """Which tokens may come next."""

    def __init__(self, compiled: CompiledGrammar, generated: Sequence[int] = ()) -> None:
        """Raises `GrammarMismatch` for `generated` tokens that the grammar does not allow."""
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled.handle)
        for token in generated:
            self.accept(token)

    @property
    def matcher(self) -> Any:
        """xgrammar's, for `MaskFiller`."""
        return self._matcher

    def accept(self, token: int) -> None:
        """`token` comes next; raises `GrammarMismatch` if it cannot."""
        if not self._matcher.accept_token(token):
            raise GrammarMismatch(f"the grammar does not allow the token {token} here, yet it was generated")
