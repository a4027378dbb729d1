"""The token log of one sequence: the truth about what it has generated, whatever epoch a token came from.

Tokens are logged in order of position. One that comes early (decode's second token can overtake prefill's first) waits
for the gap to close; one that was logged already must be equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.rooms import TokenEvent

_MAX_EARLY = 4096
"""Tokens that may wait for a gap to close; far more than can be generated while a frame is under way."""


class ContradictionError(Exception):
    """A token cannot belong to the sequence that the log begins."""


class TokenLog:
    """Tokens by position from 0."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._early: dict[int, TokenEvent] = {}

    def offer(self, event: TokenEvent) -> Sequence[TokenEvent]:
        """The events that this one lets into the log, in order: often just itself, sometimes none or several.

        Raises `ContradictionError` for a token that differs from the logged one, or lies absurdly far ahead.
        """
        tokens = self.tokens
        position = event.position
        if position == len(tokens):
            tokens.append(event.token)
            if not self._early:
                return (event,)
            return [event, *self._closed_gap()]
        if position < len(tokens):
            if tokens[position] != event.token:
                raise ContradictionError(
                    f"token {event.token} at position {position}, but {tokens[position]} is logged"
                )
            return ()
        if position - len(tokens) > _MAX_EARLY:
            raise ContradictionError(f"a token at position {position}, but only {len(tokens)} are logged")
        self._early[position] = event
        return ()

    def forget_early(self) -> None:
        """Drop what waits for a gap to close: the epoch that would close it is over."""
        self._early.clear()

    def _closed_gap(self) -> list[TokenEvent]:
        released: list[TokenEvent] = []
        while (event := self._early.pop(len(self.tokens), None)) is not None:
            self.tokens.append(event.token)
            released.append(event)
        return released
