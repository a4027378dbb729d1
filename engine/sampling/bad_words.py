"""Sequences of tokens that an output may not contain: what would complete one now.

As vLLM has it: only generated tokens count, and no other tokens that spell the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

_NONE = np.empty(0, np.int64)


class BadWords:
    """Of one sequence."""

    def __init__(self, words: Sequence[Sequence[int]], generated: Iterable[int]) -> None:
        self._ends: dict[tuple[int, ...], npt.NDArray[np.int64]] = {}
        """The last tokens of words, by those before them."""
        for begin in {tuple(word[:-1]) for word in words}:
            ends = sorted({word[-1] for word in words if tuple(word[:-1]) == begin})
            self._ends[begin] = np.array(ends, np.int64)
        self._lengths = sorted({len(begin) for begin in self._ends})
        self._recent: deque[int] = deque(generated, maxlen=self._lengths[-1] if words else 0)
        self.ends = self._ends_now()
        """The tokens that would complete a word now."""

    def add(self, token: int) -> None:
        """The sequence has generated `token`."""
        if self._lengths:
            self._recent.append(token)
            self.ends = self._ends_now()

    def _ends_now(self) -> npt.NDArray[np.int64]:
        recent = tuple(self._recent)
        begins = (recent[len(recent) - length :] for length in self._lengths if length <= len(recent))
        found = [ends for begin in begins if (ends := self._ends.get(begin)) is not None]
        return np.concatenate(found) if found else _NONE
