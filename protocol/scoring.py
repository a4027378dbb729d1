"""Log-probabilities of a prompt's own tokens: what a request asks for, and the values as they travel to the router."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec

_MAX_VALUES = 1 << 16
"""Numbers in one piece of scores, about: half a megabyte on a link."""


class Scoring(msgspec.Struct, frozen=True, array_like=True):
    """Which of a prompt's tokens are scored, and what is wanted of each besides its own log-probability.

    The token at a position is scored by what the model expected after all tokens before it. So the first one has no
    score, and the KV of whatever stands before `start - 1` may come out of a cache.
    """

    start: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    """The first position that is scored; the last one is the prompt's last."""
    top: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    """How many of the likeliest tokens."""
    tokens: tuple[int, ...] = ()
    """Tokens whose log-probabilities are wanted at every position."""
    ranks: bool = False
    """Whether each token's place among all is wanted, 1 for the likeliest."""


class PositionScores(msgspec.Struct, frozen=True, array_like=True):
    """Scores of consecutive positions, by columns; those that were not asked for are empty."""

    first: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    """Position of the first token scored here."""
    logprobs: list[float]
    """One for each position."""
    ranks: list[int]
    top_tokens: list[int]
    """`Scoring.top` for each position, likeliest first; -1 where there are no more."""
    top_logprobs: list[float]
    tokens: list[float]
    """One for each of `Scoring.tokens`, for each position."""

    def pieces(self, scoring: Scoring) -> Iterator[PositionScores]:
        """The same in pieces small enough for a link."""
        top, named = scoring.top, len(scoring.tokens)
        step = max(1, _MAX_VALUES // (1 + scoring.ranks + 2 * top + named))
        for start in range(0, len(self.logprobs), step):
            end = start + step
            yield PositionScores(
                first=self.first + start,
                logprobs=self.logprobs[start:end],
                ranks=self.ranks[start:end],
                top_tokens=self.top_tokens[start * top : end * top],
                top_logprobs=self.top_logprobs[start * top : end * top],
                tokens=self.tokens[start * named : end * named],
            )
