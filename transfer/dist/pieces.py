"""How a copy is cut into pieces: which pages of the peer go to which of ours, in runs adjacent on both sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transfer.io_loop import Timer
from transfer.jobs import PageCopy
from transfer.spans import Runs

_PARTS = 6
"""A copy that is verified has at least so many pieces, so that one is hashed while the next is on its way; but none
needs to be smaller than this, as each costs some messages."""
_LEAST_BYTES = 1 << 20


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


def next_pages(copy: PageCopy, first: int, *, at_most: int) -> int:
    """How many pages a piece of `copy` has that begins with its page `first`."""
    wanted = at_most
    if copy.job.checksums:
        wanted = max(-(-copy.num_pages // _PARTS), _LEAST_BYTES // copy.page_bytes, 1)
    return min(wanted, at_most, copy.num_pages - first)


def joint_runs(copy: PageCopy, first: int, count: int) -> tuple[Runs, Runs]:
    """The runs of `count` pages of `copy` at the peer and here, which have the same lengths."""
    sources = np.asarray(copy.job.source_pages[first : first + count], dtype=np.int64)
    targets = np.asarray(copy.job.target_pages[first : first + count], dtype=np.int64)
    apart = (np.diff(sources) != 1) | (np.diff(targets) != 1)
    starts = np.concatenate(([0], np.flatnonzero(apart) + 1))
    counts = np.diff(starts, append=count)
    return np.stack([sources[starts], counts], axis=1), np.stack([targets[starts], counts], axis=1)
