"""How a copy is cut into pieces, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transfer.io_loop import Timer
from transfer.jobs import PageCopy
from transfer.spans import Runs

_PARTS = 6
"""A copy that is verified has at least so many pieces, so that one is hashed while the next is on its way; but none
needs to be smaller than this, as each costs some messages."""
_LEAST_BYTES = 2 << 20


@dataclass(kw_only=True, eq=False)
class Piece:
    """The next `count` pages of a copy, on their way into our pages: until it has landed, or the helper process that
    takes it has ended, they may be written at any moment."""

    job: int
    copy: PageCopy
    count: int
    timer: Timer
    wanted: bool = True
    """Not once its copy was ended."""


class Progress:
    """Of a copy that is not answered yet."""

    def __init__(self, copy: PageCopy) -> None:
        self.ended = False
        """Nothing more is ordered for it; it is to be answered with `error`."""
        self.error: str | None = None
        self._copy = copy
        self._sources = copy.sources
        self._targets = copy.targets
        self._ordered = 0

    @property
    def is_ordered(self) -> bool:
        """Whether all of its pages are here or on their way."""
        return self._ordered == len(self._targets)

    def order(self, *, at_most: int) -> tuple[Runs, Runs]:
        """The next pages that are to come, as runs at the peer and here: as many, of the same lengths, each of them
        adjacent on both sides."""
        first = self._ordered
        self._ordered += self._next_pages(at_most)
        sources, targets = (pages[first : self._ordered] for pages in (self._sources, self._targets))
        apart = (np.diff(sources) != 1) | (np.diff(targets) != 1)
        starts = np.concatenate(([0], np.flatnonzero(apart) + 1))
        counts = np.diff(starts, append=len(sources))
        return np.stack([sources[starts], counts], axis=1), np.stack([targets[starts], counts], axis=1)

    def _next_pages(self, at_most: int) -> int:
        copy, wanted = self._copy, at_most
        if copy.job.checksums:
            wanted = max(-(-copy.num_pages // _PARTS), _LEAST_BYTES // copy.page_bytes, 1)
        return min(wanted, at_most, copy.num_pages - self._ordered)
