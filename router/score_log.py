"""The scores of one prompt's tokens, in order of position, whatever epoch they came from.

Made with its sequence, filled by the generation, read by the response once it is complete: it is so before the
sequence's first token is let out. An epoch that fails leaves what it has scored, and the next one goes on after it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from protocol.scoring import PositionScores, Scoring
from router.token_log import ContradictionError


@dataclass(frozen=True, slots=True)
class PositionScore:
    """What is known of the token at one position."""

    position: int
    logprob: float
    rank: int | None
    top: list[tuple[int, float]]
    """(token, logprob), likeliest first."""
    named: list[float]
    """Of `Scoring.tokens`, in their order."""


class PackedScores(msgspec.Struct, frozen=True, array_like=True):
    """A `ScoreLog`'s columns, as a stream that can be come back to keeps them."""

    logprobs: bytes
    ranks: bytes
    top_tokens: bytes
    top_logprobs: bytes
    named: bytes

    @property
    def num_bytes(self) -> int:
        return sum(len(column) for column in msgspec.structs.astuple(self))


class ScoreLog:
    """Scores from `scoring.start` on up to the end of a prompt of `prompt_tokens`."""

    def __init__(self, scoring: Scoring, *, prompt_tokens: int) -> None:
        self.scoring = scoring
        self._end = max(scoring.start, prompt_tokens)
        # Arrays, because there can be as many values as a router may queue tokens, times twenty.
        self._logprobs = array("d")
        self._ranks = array("i")
        self._top_tokens = array("i")
        self._top_logprobs = array("d")
        self._named = array("d")

    @property
    def is_complete(self) -> bool:
        return self._next == self._end

    @property
    def rest(self) -> Scoring | None:
        """What is still to be scored."""
        return None if self.is_complete else msgspec.structs.replace(self.scoring, start=self._next)

    def offer(self, scores: PositionScores) -> None:
        """Take the next scores, ignore those that are known; raises `ContradictionError` for others."""
        count, top, named = len(scores.logprobs), self.scoring.top, len(self.scoring.tokens)
        if scores.first >= self.scoring.start and scores.first + count <= self._next:
            return
        if scores.first != self._next or scores.first + count > self._end:
            raise ContradictionError(
                f"scores of {count} tokens from position {scores.first} on, but those from {self._next} up to "
                f"{self._end} are due"
            )
        lengths = [len(scores.ranks), len(scores.top_tokens), len(scores.top_logprobs), len(scores.tokens)]
        if lengths != [count * width for width in (int(self.scoring.ranks), top, top, named)]:
            raise ContradictionError(f"scores of {count} tokens that are not what was asked for")
        self._logprobs.extend(scores.logprobs)
        self._ranks.extend(scores.ranks)
        self._top_tokens.extend(scores.top_tokens)
        self._top_logprobs.extend(scores.top_logprobs)
        self._named.extend(scores.tokens)

    def packed(self) -> PackedScores:
        return PackedScores(*(column.tobytes() for column in self._columns))

    def restore(self, packed: PackedScores) -> None:
        """Have the scores of an earlier log of the same prompt; this one is empty so far."""
        for column, data in zip(self._columns, msgspec.structs.astuple(packed), strict=True):
            column.frombytes(data)

    def __iter__(self) -> Iterator[PositionScore]:
        """Every position scored so far, in order."""
        top, named = self.scoring.top, len(self.scoring.tokens)
        for index, logprob in enumerate(self._logprobs):
            span = slice(index * top, (index + 1) * top)
            best = zip(self._top_tokens[span], self._top_logprobs[span], strict=True)
            yield PositionScore(
                position=self.scoring.start + index,
                logprob=logprob,
                rank=self._ranks[index] if self.scoring.ranks else None,
                top=[(token, each) for token, each in best if token >= 0],
                named=self._named[index * named : (index + 1) * named].tolist(),
            )

    @property
    def _columns(self) -> tuple[array[float] | array[int], ...]:
        """In the order of `PackedScores`."""
        return (self._logprobs, self._ranks, self._top_tokens, self._top_logprobs, self._named)

    @property
    def _next(self) -> int:
        return self.scoring.start + len(self._logprobs)
