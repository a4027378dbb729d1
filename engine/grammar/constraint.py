"""One sequence's place in its grammar.

A `Constraint` is made for a request before it enters the engine, from the tokens generated so far, and lives as long
as the request does, through preemptions and hand-overs of its KV. The engine thread leaves each token here, as soon as
the mask that it was sampled under has let it pass. In between the constraint belongs to the thread of `MaskFiller`,
which tells the matcher of the token and has it fill the next mask. One that is given up stays so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from engine.grammar.compiled import CompiledGrammar

MASK_BITS = 32
"""Tokens in a word of a mask."""
_SLOW_S = 0.02
"""A token and the mask after it that take longer hold up everybody's step; most take microseconds."""


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
        self._mask: Any = None
        """int32 `[words]`: of the next token, once it is filled."""
        self._untold: int | None = None
        """The last token, while the matcher does not know of it."""
        for token in generated:
            self.accept(token)

    def accept(self, token: int) -> None:
        """`token` comes next; raises `GrammarMismatch` if it cannot, or the grammar is given up.

        If its mask has been filled, which must then still hold, that decides, and the matcher is told with the next
        mask; else the matcher is asked at once.
        """
        mask, self._mask = self._mask, None
        if not self._given_up and mask is None:
            began = time.thread_time()  # of this thread: others may keep the processors busy
            self._tell(token)
            self._spend(time.thread_time() - began)
        elif not self._given_up:
            self._untold = token
            if not mask.item(token // MASK_BITS) >> token % MASK_BITS & 1:
                self.give_up(_misplaced(token))
        if self._given_up:
            raise GrammarMismatch(self._given_up)

    def fill(self, bits: Any, place: int) -> None:
        """Write the mask of the next token into row `place` of int32 `bits`; when that fails, or the matcher does not
        take the last token, the grammar is given up. Where it is, any token may come."""
        mask = bits.numpy()[place]
        if not self._given_up:
            began = time.thread_time()
            try:
                untold, self._untold = self._untold, None
                if untold is not None:
                    self._tell(untold)
                if not self._given_up:
                    self._matcher.fill_next_token_bitmask(bits, place)
            except Exception as error:
                self.give_up(f"what the grammar allows next could not be found: {error}")
            self._spend(time.thread_time() - began)
        if self._given_up:
            mask[:] = -1
        self._mask = mask

    def give_up(self, why: str) -> None:
        """The grammar is not followed any further: the next `accept` raises, without asking for its token."""
        self._given_up = self._given_up or why

    def _tell(self, token: int) -> None:
        if not self._matcher.accept_token(token):
            self.give_up(_misplaced(token))

    def _spend(self, seconds: float) -> None:
        if seconds > _SLOW_S:
            self._left_s -= seconds
            if self._left_s < 0:
                self.give_up("following the grammar takes too long; make it less ambiguous")


def _misplaced(token: int) -> str:
    return f"the grammar does not allow the token {token} here, yet it was generated"
