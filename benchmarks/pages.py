"""Which pages the benchmarks of the transports move, and between whom."""

from __future__ import annotations

import os

import numpy as np

from protocol.rooms import PeerAddress

SECRET = os.urandom(16)
LAYOUT = "benchmark"
BOOT = 1
ADDRESS = PeerAddress("peer", BOOT, "127.0.0.1", 1)

PageLists = tuple[list[int], list[int]]
"""Source and target pages."""


def contiguous(count: int, num_pages: int) -> PageLists:
    """Source and target pages of one span."""
    return list(range(count)), list(range(count))


def scattered(count: int, num_pages: int) -> PageLists:
    """Source and target pages at random: nearly as many spans as pages."""
    random = np.random.default_rng(count)
    return random.permutation(num_pages)[:count].tolist(), random.permutation(num_pages)[:count].tolist()


class Fresh:
    """Pages in turns: each call takes `count` pages of pools of `num_pages` that the last ones did not, as far as
    there are any."""

    def __init__(self, count: int, num_pages: int) -> None:
        self._count = count
        self._next = 0
        self._first = range(0, num_pages - count + 1, count)
        random = np.random.default_rng(count)
        self._mixed = [random.permutation(num_pages).tolist() for _ in range(2)]

    def contiguous(self) -> PageLists:
        pages = list(self._take())
        return pages, pages

    def scattered(self) -> PageLists:
        places = self._take()
        source, target = ([pages[place] for place in places] for pages in self._mixed)
        return source, target

    def in_order(self) -> PageLists:
        """Source pages of one span to target pages at random."""
        places = self._take()
        return list(places), [self._mixed[1][place] for place in places]

    def _take(self) -> range:
        first = self._first[self._next % len(self._first)]
        self._next += 1
        return range(first, first + self._count)


def human(nbytes: int) -> str:
    return f"{nbytes >> 20} MB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KB"
