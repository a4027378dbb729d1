"""Who may have which page: the books of the KV pool.

Every page is in one of four states, and only the moves of `_MOVES` exist:

    FREE -> USED            allocate: a request owns it
    USED -> FREE            free
    USED -> CACHED          cache: the prefix cache owns it now
    CACHED -> FREE          evict
    USED -> QUARANTINED     quarantine: its owner is gone but a write to it may still land
    QUARANTINED -> FREE     drained: that write has ended

Free pages are kept as runs of adjacent pages. An allocation takes the smallest run that holds all of it, else as few
runs as possible, because a run of pages is one span to the transfer layer.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class PageState(enum.IntEnum):
    FREE = 0
    USED = 1
    CACHED = 2
    QUARANTINED = 3


_MOVES = frozenset(
    {
        (PageState.FREE, PageState.USED),
        (PageState.USED, PageState.FREE),
        (PageState.USED, PageState.CACHED),
        (PageState.CACHED, PageState.FREE),
        (PageState.USED, PageState.QUARANTINED),
        (PageState.QUARANTINED, PageState.FREE),
    }
)


class PageAllocator:
    """The states of `num_pages` pages. Deterministic: the same calls give the same pages.

    A page given in the wrong state, or twice, is a bug of the caller: AssertionError, and nothing has changed.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._states = np.zeros(num_pages, np.uint8)
        self._counts = [num_pages, 0, 0, 0]
        self._length_at: dict[int, int] = {0: num_pages}
        """First page of each free run -> its length."""
        self._start_before: dict[int, int] = {num_pages: 0}
        """Page after each free run -> its first page."""
        self._by_length: list[tuple[int, int]] = [(num_pages, 0)]
        """(length, first page) of each free run, ascending."""

    def count(self, state: PageState) -> int:
        """Pages in `state` now."""
        return self._counts[state]

    @property
    def num_free(self) -> int:
        return self._counts[PageState.FREE]

    def states(self) -> npt.NDArray[np.uint8]:
        """A copy of every page's state, `[num_pages]`, for the auditor."""
        return self._states.copy()

    def free_runs(self) -> list[tuple[int, int]]:
        """(first page, length) of every free run in order of address, for the auditor."""
        return sorted(self._length_at.items())

    def allocate(self, count: int, *, after: int | None = None) -> list[int]:
        """`count` pages, FREE -> USED; the caller has made sure that so many are free.

        With `after`, the run that begins right behind that page comes first, so that a sequence grows in place.
        """
        assert 0 <= count <= self.num_free, f"{count} pages wanted, {self.num_free} free"
        pages: list[int] = []
        if after is not None and count and after + 1 in self._length_at:
            pages += self._take(after + 1, min(count, self._length_at[after + 1]))
        while len(pages) < count:
            missing = count - len(pages)
            fitting = bisect_left(self._by_length, (missing, -1))
            length, start = self._by_length[min(fitting, len(self._by_length) - 1)]
            pages += self._take(start, min(missing, length))
        self._move(pages, PageState.FREE, PageState.USED)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """USED -> FREE."""
        self._move(pages, PageState.USED, PageState.FREE)
        self._give(pages)

    def cache(self, pages: Sequence[int]) -> None:
        """USED -> CACHED."""
        self._move(pages, PageState.USED, PageState.CACHED)

    def evict(self, pages: Sequence[int]) -> None:
        """CACHED -> FREE."""
        self._move(pages, PageState.CACHED, PageState.FREE)
        self._give(pages)

    def quarantine(self, pages: Sequence[int]) -> None:
        """USED -> QUARANTINED."""
        self._move(pages, PageState.USED, PageState.QUARANTINED)

    def drained(self, pages: Sequence[int]) -> None:
        """QUARANTINED -> FREE."""
        self._move(pages, PageState.QUARANTINED, PageState.FREE)
        self._give(pages)

    def _move(self, pages: Sequence[int], source: PageState, target: PageState) -> None:
        assert (source, target) in _MOVES, f"no page goes from {source.name} to {target.name}"
        if not pages:
            return
        index = np.asarray(pages, np.int64)
        wrong = index[self._states[index] != source]
        assert wrong.size == 0, f"pages {wrong.tolist()} are not {source.name}, so they cannot become {target.name}"
        assert len(set(pages)) == len(pages), f"a page is named twice in {list(pages)}"
        self._states[index] = target
        self._counts[source] -= len(pages)
        self._counts[target] += len(pages)

    def _take(self, start: int, count: int) -> list[int]:
        """Cut the first `count` pages off the free run at `start`."""
        length = self._remove_run(start)
        if length > count:
            self._insert_run(start + count, length - count)
        return list(range(start, start + count))

    def _give(self, pages: Sequence[int]) -> None:
        """Add pages to the free runs, joined with their neighbours."""
        ordered = sorted(pages)
        first = 0
        for index in range(1, len(ordered) + 1):
            if index < len(ordered) and ordered[index] == ordered[index - 1] + 1:
                continue
            start, length = ordered[first], index - first
            first = index
            if start + length in self._length_at:
                length += self._remove_run(start + length)
            if start in self._start_before:
                before = self._start_before[start]
                length += self._remove_run(before)
                start = before
            self._insert_run(start, length)

    def _insert_run(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_before[start + length] = start
        insort(self._by_length, (length, start))

    def _remove_run(self, start: int) -> int:
        length = self._length_at.pop(start)
        del self._start_before[start + length]
        del self._by_length[bisect_left(self._by_length, (length, start))]
        return length
