"""One sequence's place in its grammar.

A `Constraint` is made for a request before it enters the engine, from the tokens generated so far, and lives as long
as the request does, through preemptions and hand-overs of its KV. The engine thread tells it each token; the thread
of `MaskFiller` reads it between two of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from engine.grammar.compiled import CompiledGrammar

_SLOW_S = 0.02
"""A token or mask that takes longer holds up everybody's step; most take microseconds."""
_MAX_SLOW_S = 0.5


class GrammarMismatch(ValueError):
    """A generated token cannot stand where it does: a mask was wrong or not applied; or the grammar cannot be followed
    any further, because that takes too long (ambiguous ones: about the cube of the length) or failed."""


class Constraint:
    """Which tokens may come next."""

    def __init__(self, compiled: CompiledGrammar, generated: Sequence[int] = ()) -> None:
        """Raises `GrammarMismatch` for `generated` tokens that the grammar does not allow."""
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled.handle)
        self._slow_s = 0.0
        self._broken = ""
        for token in generated:
            self.accept(token)

    def accept(self, token: int) -> None:
        """`token` comes next; raises `GrammarMismatch` if it cannot, or the grammar has used up its time."""
        if not self._broken:
            with self._timed():
                allowed = self._matcher.accept_token(token)
            if not allowed:
                raise GrammarMismatch(f"the grammar does not allow the token {token} here, yet it was generated")
        if self._broken:
            raise GrammarMismatch(self._broken)

    def fill(self, bits: Any, place: int) -> None:
        """Write the mask of the next token into row `place` of int32 `bits`; all may come when that fails, and then
        `accept` raises."""
        try:
            with self._timed():
                self._matcher.fill_next_token_bitmask(bits, place)
        except Exception as error:
            self._broken = f"what the grammar allows next could not be found: {error}"
            bits[place] = -1

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.thread_time()  # of this thread: others may keep the processors busy
        yield
        if (took := time.thread_time() - began) > _SLOW_S:
            self._slow_s += took
            if self._slow_s > _MAX_SLOW_S:
                self._broken = "following the grammar takes too long; make it less ambiguous"
