"""From page lists to spans: the fewest contiguous pieces in which pages move.

A span is a run of pages that is contiguous at the source *and* at the target, so that it moves in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.int64]
"""[pages]: numbers of pages, or of grains."""

Runs = npt.NDArray[np.int64]
"""[runs, 2]: the first page of each run of adjacent pages, and how many there are."""


class Span(NamedTuple):
    """Pages `source .. source + length` of the peer go to our pages `target .. target + length`."""

    source: int
    target: int
    length: int


def coalesce(source_pages: Sequence[int], target_pages: Sequence[int]) -> list[Span]:
    """The spans that move `source_pages[i]` to `target_pages[i]` for every i, in that order."""
    spans: list[Span] = []
    first_source = first_target = next_source = next_target = -1
    for source, target in zip(source_pages, target_pages, strict=True):
        if source != next_source or target != next_target:
            if next_source >= 0:
                spans.append(Span(first_source, first_target, next_source - first_source))
            first_source, first_target = source, target
        next_source, next_target = source + 1, target + 1
    if next_source >= 0:
        spans.append(Span(first_source, first_target, next_source - first_source))
    return spans


def runs(pages: npt.ArrayLike) -> Runs:
    """The runs of adjacent pages that `pages` consist of, in order."""
    listed = np.asarray(pages, dtype=np.int64)
    first = np.ones(len(listed), dtype=np.bool_)
    np.not_equal(listed[1:], listed[:-1] + 1, out=first[1:])
    starts = first.nonzero()[0]
    found = np.empty((len(starts), 2), dtype=np.int64)
    found[:, 0] = listed[starts]
    found[:-1, 1] = starts[1:] - starts[:-1]
    found[-1:, 1] = len(listed) - starts[-1:]
    return found


def blocks(spans: Sequence[Span], *, max_pages: int) -> Iterator[list[Span]]:
    """Split `spans` into lists of at most `max_pages` pages each, cutting spans where needed, in order."""
    block: list[Span] = []
    room = max_pages
    for span in spans:
        while span.length >= room:
            block.append(span if span.length == room else Span(span.source, span.target, room))
            yield block
            span = Span(span.source + room, span.target + room, span.length - room)
            block, room = [], max_pages
        if span.length:
            block.append(span)
            room -= span.length
    if block:
        yield block


def checked_pages(pages: Sequence[int], *, num_pages: int, whose: str) -> Pages:
    """`pages` as an array. Raises `ValueError` when they are not all in a pool of `num_pages` pages."""
    try:
        listed = np.array(pages, dtype=np.int64)
        if not listed.size or (listed.min() >= 0 and listed.max() < num_pages):
            return listed
    except OverflowError:  # numbers that not even a page could have
        pass
    raise ValueError(f"pages {min(pages)} to {max(pages)} are not all in {whose} pool of {num_pages} pages")
