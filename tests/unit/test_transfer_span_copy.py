"""Copies of span lists: every byte where it belongs and no other touched, compiled or not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.span_copy import SpanCopier, Spans

COPIERS = {"native": SpanCopier(), "python": SpanCopier(native=False)}
SIZE = 200_000
SOURCE = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)


@st.composite
def span_lists(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(source, target, length), the targets apart from each other, at any alignment."""
    spans, target = [], draw(st.integers(0, 200))
    for length in draw(st.lists(st.one_of(st.integers(0, 1200), st.integers(0, 40_000)), max_size=12)):
        target += draw(st.integers(0, 70))
        if target + length > SIZE:
            break
        spans.append((draw(st.integers(0, SIZE - length)), target, length))
        target += length
    return draw(st.permutations(spans))


def as_spans(listed: list[tuple[int, int, int]]) -> Spans:
    sources, targets, lengths = zip(*listed, strict=True) if listed else ((), (), ())
    return Spans.of(sources, targets, lengths)


def test_this_machine_has_the_compiled_copy():
    assert COPIERS["native"].is_native


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@settings(max_examples=60, deadline=None)
@given(listed=span_lists())
def test_bytes_land_where_they_belong_and_nowhere_else(copier, streaming, listed):
    expected, found = np.zeros(SIZE, dtype=np.uint8), np.zeros(SIZE, dtype=np.uint8)
    for source, target, length in listed:
        expected[target : target + length] = SOURCE[source : source + length]
    run = copier.begin(found, SOURCE, as_spans(listed), streaming=streaming)
    assert run.advance(run.left) == sum(length for _, _, length in listed)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@settings(max_examples=60, deadline=None)
@given(listed=span_lists(), sizes=st.lists(st.integers(1, 30_000), min_size=1))
def test_a_run_copies_as_much_as_it_is_told_and_in_order(copier, listed, sizes):
    found, expected = np.zeros(SIZE, dtype=np.uint8), np.zeros(SIZE, dtype=np.uint8)
    order = [(source + at, target + at) for source, target, length in listed for at in range(length)]
    run = copier.begin(found, SOURCE, as_spans(listed), streaming=False)
    passed = 0
    while passed < len(order):
        assert run.left == len(order) - passed
        most = sizes[passed % len(sizes)]
        moved = run.advance(most)
        assert moved == min(most, len(order) - passed)
        pairs = np.array(order[passed : passed + moved])
        expected[pairs[:, 1]] = SOURCE[pairs[:, 0]]
        assert np.array_equal(found, expected)
        passed += moved
    assert run.left == 0
    assert run.advance(1) == 0


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@settings(max_examples=60, deadline=None)
@given(listed=span_lists(), sizes=st.lists(st.integers(1, 30_000), min_size=1))
def test_what_is_gathered_by_any_pieces_is_all_in_order(copier, listed, sizes):
    spans = as_spans(listed)
    packed, found = np.empty(30_000, dtype=np.uint8), b""
    gather = copier.gather(SOURCE, spans.sources, spans.lengths, into=packed)
    for step in itertools.count():
        if not gather.left:
            break
        packed[:] = 33
        most, left = sizes[step % len(sizes)], gather.left
        moved = gather.advance(most)
        assert moved == min(most, left) == left - gather.left
        assert (packed[moved:] == 33).all()
        found += packed[:moved].tobytes()
    assert found == b"".join(SOURCE[source : source + length].tobytes() for source, _, length in listed)


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 4), (0, -4), (47, 4), (0, 51), (2**63 - 2, 4), (-(2**63), 4), (4, 2**63 - 1)]
)
@pytest.mark.parametrize("before", [1, 40])
def test_a_span_outside_of_its_memory_is_refused(copier, offset, length, before):
    small, good = np.zeros(50, dtype=np.uint8), [0] * (before + 1)
    bad, lengths = (np.array([each] * before + [last], dtype=np.int64) for each, last in ((0, offset), (10, length)))
    error = rf"span {before} of {before + 1}, {length} bytes at {offset}, is not inside a "
    with pytest.raises(ValueError, match=error + "target of 50"):
        copier.begin(small, SOURCE, Spans.of(good, bad, lengths), streaming=True)
    with pytest.raises(ValueError, match=rf"span {before} of {before + 1}, {length} bytes"):
        copier.begin(np.zeros(100, dtype=np.uint8), small, Spans.of(bad, good, lengths), streaming=True)
    with pytest.raises(ValueError, match=error + "source of 50"):
        copier.gather(small, bad, lengths, into=small)


def test_memory_that_is_read_only_is_never_written():
    target = np.zeros(50, dtype=np.uint8)
    target.flags.writeable = False
    with pytest.raises(AssertionError):
        COPIERS["native"].begin(target, SOURCE, as_spans([(0, 0, 10)]), streaming=False)
    with pytest.raises(AssertionError):
        COPIERS["native"].gather(SOURCE, *(as_spans([(0, 0, 10)]).lengths,) * 2, into=target)


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
def test_no_more_is_packed_than_fits(copier):
    run = copier.gather(SOURCE, *(as_spans([(0, 0, 10)]).lengths,) * 2, into=np.zeros(9, dtype=np.uint8))
    with pytest.raises(AssertionError):
        run.advance(10)


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="1 sources, 2 targets and 1 lengths"):
        Spans.of([0], [0, 1], [4])
    with pytest.raises(ValueError, match="1 source pages for 2 target pages"):
        Spans.of_pages([0], [0, 1], 4)
