"""The books of pages: states, runs, and moves that do not exist."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.page_allocator import PageAllocator, PageState


def test_allocation_prefers_the_smallest_run_that_holds_it() -> None:
    allocator = PageAllocator(20)
    assert allocator.allocate(20) == list(range(20))
    allocator.free([2, 3, 4, 5, 6])
    allocator.free([10, 11, 12])
    assert allocator.allocate(3) == [10, 11, 12]
    assert allocator.allocate(5) == [2, 3, 4, 5, 6]


def test_allocation_without_such_a_run_uses_few_runs() -> None:
    allocator = PageAllocator(20)
    allocator.allocate(20)
    allocator.free([0, 1, 4, 5, 6, 7, 10, 11, 12, 15])
    assert allocator.allocate(6) == [4, 5, 6, 7, 0, 1]


def test_growth_goes_on_behind_the_last_page() -> None:
    allocator = PageAllocator(16)
    first = allocator.allocate(3)
    assert allocator.allocate(2, after=first[-1]) == [3, 4]
    allocator.free([4])
    assert allocator.allocate(1, after=9) == [4], "nothing free behind page 9's run start, so the best fit is taken"


def test_freed_neighbours_join() -> None:
    allocator = PageAllocator(9)
    allocator.allocate(9)
    for page in (0, 2, 4, 6, 8, 1, 3, 5, 7):
        allocator.free([page])
    assert allocator.free_runs() == [(0, 9)]


@pytest.mark.parametrize("move", ["free", "cache", "evict", "quarantine", "drained"])
def test_a_free_page_can_only_be_allocated(move: str) -> None:
    allocator = PageAllocator(4)
    with pytest.raises(AssertionError, match="pages \\[1\\] are not"):
        getattr(allocator, move)([1])
    assert allocator.num_free == 4


def test_a_page_is_freed_once() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(2)
    with pytest.raises(AssertionError, match="twice"):
        allocator.free([0, 0])
    allocator.free([0])
    with pytest.raises(AssertionError, match="not USED"):
        allocator.free([0])
    assert allocator.num_free == 3


def test_more_than_is_free_is_refused() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(3)
    with pytest.raises(AssertionError, match="2 pages wanted, 1 free"):
        allocator.allocate(2)


_MOVES = st.one_of(
    st.tuples(st.just("allocate"), st.integers(0, 9), st.integers(0, 40)),
    st.tuples(st.sampled_from(["free", "cache", "evict", "quarantine", "drained"]), st.integers(1, 9), st.integers()),
)
_SOURCE = {
    "free": PageState.USED,
    "cache": PageState.USED,
    "evict": PageState.CACHED,
    "quarantine": PageState.USED,
    "drained": PageState.QUARANTINED,
}
_TARGET = {"cache": PageState.CACHED, "quarantine": PageState.QUARANTINED}


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(_MOVES, max_size=60))
def test_states_and_runs_equal_a_plain_list_of_states(moves: list[tuple[str, int, int]]) -> None:
    allocator = PageAllocator(40)
    states = [PageState.FREE] * 40
    for move, count, number in moves:
        if move == "allocate":
            free_before = {page for page in range(40) if states[page] == PageState.FREE}
            if count > len(free_before):
                continue
            longest = _longest_run(free_before)
            pages = allocator.allocate(count)
            assert len(set(pages)) == count
            assert set(pages) <= free_before
            if 0 < count <= longest:
                assert pages == list(range(pages[0], pages[0] + count)), "one run was there, so one run is given"
            for page in pages:
                states[page] = PageState.USED
        else:
            there = [page for page in range(40) if states[page] == _SOURCE[move]]
            pages = [there[(number + 3 * i) % len(there)] for i in range(count)] if there else []
            pages = list(dict.fromkeys(pages))
            getattr(allocator, move)(pages)
            for page in pages:
                states[page] = _TARGET.get(move, PageState.FREE)
        assert np.array_equal(allocator.states(), np.array(states))
        assert [allocator.count(state) for state in PageState] == [states.count(state) for state in PageState]
        runs = allocator.free_runs()
        assert [page for start, length in runs for page in range(start, start + length)] == [
            page for page in range(40) if states[page] == PageState.FREE
        ]
        assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs)), "adjacent runs are one run"


def _longest_run(pages: set[int]) -> int:
    best = length = 0
    for page in range(41):
        length = length + 1 if page in pages else 0
        best = max(best, length)
    return best
