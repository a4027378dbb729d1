"""Which pages the benchmarks of the transports move, and between whom."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from protocol.rooms import PeerAddress

SECRET = os.urandom(16)
LAYOUT = "benchmark"
BOOT = 1
ADDRESS = PeerAddress("peer", BOOT, "127.0.0.1", 1)

PageChooser = Callable[[int, int], tuple[list[int], list[int]]]
"""Source and target pages, given how many are wanted and the pages of each pool."""


def contiguous(count: int, num_pages: int) -> tuple[list[int], list[int]]:
    """Source and target pages of one span."""
    return list(range(count)), list(range(count))


def scattered(count: int, num_pages: int) -> tuple[list[int], list[int]]:
    """Source and target pages at random: nearly as many spans as pages."""
    random = np.random.default_rng(count)
    return random.permutation(num_pages)[:count].tolist(), random.permutation(num_pages)[:count].tolist()


def human(nbytes: int) -> str:
    return f"{nbytes >> 20} MB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KB"
