"""One sequence's place in its grammar.

A `Constraint` is made for a request before it enters the engine, from the tokens generated so far, and lives as long
as the request does, through preemptions and hand-overs of its KV. The engine thread tells it each token; the thread
of `MaskFiller` reads it between two of them. One that is given up stays so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from engine.grammar.compiled import CompiledGrammar

_SLOW_S = 0.02
"""A token or mask that takes longer holds up everybody's step; most take microseconds."""


class GrammarMismatch(ValueError):
    """A generated token cannot stand where it does: a mask was wrong or not applied; or the grammar cannot be followed
    any further, because that takes too long (ambiguous ones: about the cube of the length) or failed."""


class Constraint:
    """Which tokens may come next."""

    def __init__(self, compiled: CompiledGrammar, generated: Sequence[int] = (), *, budget_s: float = 0.5) -> None:
        """`budget_s` is the processor time that slow tokens and masks may take together. Raises `GrammarMismatch` for
        `generated` tokens that the grammar does not allow."""
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled.handle)
        self._left_s = budget_s
        self._given_up = ""
        for token in generated:
            self.accept(token)

    def accept(self, token: int) -> None:
        """`token` comes next; raises `GrammarMismatch` if it cannot, or the grammar is given up."""
        if not self._given_up:
            began = time.thread_time()  # of this thread: others may keep the processors busy
            allowed = self._matcher.accept_token(token)
            self._spend(time.thread_time() - began)
            if not allowed:
                raise GrammarMismatch(f"the grammar does not allow the token {token} here, yet it was generated")
        if self._given_up:
            raise GrammarMismatch(self._given_up)

    def fill(self, bits: Any, place: int) -> None:
        """Write the mask of the next token into row `place` of int32 `bits`; when that fails the grammar is given up.
        Where it is, any token may come."""
        if self._given_up:
            bits[place] = -1
            return
        began = time.thread_time()
        try:
            self._matcher.fill_next_token_bitmask(bits, place)
        except Exception as error:
            self.give_up(f"what the grammar allows next could not be found: {error}")
            bits[place] = -1
        self._spend(time.thread_time() - began)

    def give_up(self, why: str) -> None:
        """The grammar is not followed any further: the next `accept` raises, without asking for its token."""
        self._given_up = self._given_up or why

    def _spend(self, seconds: float) -> None:
        if seconds > _SLOW_S:
            self._left_s -= seconds
            if self._left_s < 0:
                self.give_up("following the grammar takes too long; make it less ambiguous")
