"""Several ways to move the same bytes, measured in turns: what shares of each other's speed are taken from.

Every round measures all ways one after the other, so that a busy machine slows all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Ways = dict[str, Callable[[], float]]
"""By name; each moves as many bytes, and returns the seconds it took."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    nbytes: int
    seconds: Sequence[Mapping[str, float]]
    """Of each way, round by round."""

    def speed(self, way: str) -> float:
        """GB/s, the median of all rounds."""
        return self.nbytes / statistics.median(row[way] for row in self.seconds) / 1e9

    def share(self, way: str, base: str) -> str:
        """Of the speed of `base`: the median of the rounds' own shares."""
        return f"{statistics.median(row[base] / row[way] for row in self.seconds):.0%}"

    def cells(self, first: str, **bases: str) -> list[float | str]:
        """The speed of `first`; then of each other way its speed, and its share of the speed of the one named."""
        cells: list[float | str] = [self.speed(first)]
        for way, base in bases.items():
            cells += [self.speed(way), self.share(way, base)]
        return cells


def measure(nbytes: int, ways: Ways, *, rounds: int) -> Rounds:
    """Each way once for its first touches, then `rounds` times."""
    for way in ways.values():
        way()
    return Rounds(nbytes=nbytes, seconds=[{name: way() for name, way in ways.items()} for _ in range(rounds)])
