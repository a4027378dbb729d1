"""The pages of one sequence, in order of position.

Leading pages may be shared: they belong to the prefix cache and are held by a lock on the node where they end. The rest
are the sequence's own. The ids stand in a growing array, so that a batch copies them and no list is rebuilt per step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.radix_cache import RadixNode


class PageTable:
    """Page ids of one sequence and how many of the first are the prefix cache's."""

    __slots__ = ("_ids", "count", "node", "num_shared")

    def __init__(self) -> None:
        self._ids = np.empty(8, np.int32)
        self.count = 0
        self.num_shared = 0
        """Leading pages that the prefix cache owns."""
        self.node: RadixNode | None = None
        """Where the shared pages end in the tree; locked by this table. None when none is shared."""

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """int32 `[count]`, a view."""
        return self._ids[: self.count]

    def to_list(self) -> list[int]:
        pages: list[int] = self.ids.tolist()
        return pages

    def own(self) -> list[int]:
        """The pages that belong to this sequence alone."""
        pages: list[int] = self._ids[self.num_shared : self.count].tolist()
        return pages

    def append(self, pages: Sequence[int]) -> None:
        """Add pages at the end."""
        end = self.count + len(pages)
        if end > len(self._ids):
            grown = np.empty(max(end, 2 * len(self._ids)), np.int32)
            grown[: self.count] = self.ids
            self._ids = grown
        self._ids[self.count : end] = pages
        self.count = end

    def share(self, pages: Sequence[int], node: RadixNode | None) -> None:
        """Make the cache's `pages`, which end at `node`, the leading ones, in place of those that stood there."""
        missing = len(pages) - self.count
        if missing > 0:
            self.append([0] * missing)
        self._ids[: len(pages)] = pages
        self.num_shared = len(pages)
        self.node = node

    def clear(self) -> None:
        """Forget every page."""
        self.count = 0
        self.num_shared = 0
        self.node = None
