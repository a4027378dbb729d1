"""Copies of span lists: every byte where it belongs and no other touched, compiled or not."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.native import NativeUnavailable, load_library
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
    copier.copy(found, SOURCE, as_spans(listed), streaming=streaming)
    assert np.array_equal(found, expected)


@settings(max_examples=100, deadline=None)
@given(listed=span_lists(), max_bytes=st.integers(1000, 50_000))
def test_pieces_are_the_whole_in_order(listed, max_bytes):
    whole = as_spans(listed)
    pieces = list(whole.cut(max_bytes))
    found = np.zeros(SIZE, dtype=np.uint8)
    for piece in pieces:
        COPIERS["native"].copy(found, SOURCE, piece, streaming=False)
    expected = np.zeros(SIZE, dtype=np.uint8)
    COPIERS["native"].copy(expected, SOURCE, whole, streaming=False)
    assert np.array_equal(found, expected)
    assert [piece.nbytes for piece in pieces[:-1]] == [max_bytes] * (len(pieces) - 1)
    assert sum(piece.nbytes for piece in pieces) == whole.nbytes


def test_whole_pages_stay_whole_in_pieces_of_whole_pages():
    spans = Spans.of_pages([5, 0, 7, 3, 1], [2, 3, 0, 9, 4], 4096)
    pieces = list(spans.cut(2 * 4096))
    assert [piece.sources.tolist() for piece in pieces] == [[20480, 0], [28672, 12288], [4096]]
    assert all((piece.lengths == 4096).all() for piece in pieces)


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@pytest.mark.parametrize(
    "span",
    [(-1, 0, 4), (0, -1, 4), (0, 0, -4), (97, 0, 4), (0, 47, 4), (0, 0, 51), (2**63 - 2, 0, 4), (0, 2**63 - 2, 4)],
)
def test_a_span_outside_of_either_memory_is_refused_before_anything_is_copied(copier, span):
    target = np.zeros(50, dtype=np.uint8)
    spans = as_spans([(0, 0, 10), span])
    with pytest.raises(ValueError, match=f"span 1, {span[2]} bytes from {span[0]} to {span[1]}, is not inside"):
        copier.copy(target, SOURCE[:100], spans, streaming=True)
    assert not target.any()


def test_memory_that_is_read_only_is_never_written():
    target = np.zeros(50, dtype=np.uint8)
    target.flags.writeable = False
    with pytest.raises(AssertionError):
        COPIERS["native"].copy(target, SOURCE, as_spans([(0, 0, 10)]), streaming=False)


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="1 sources, 2 targets and 1 lengths"):
        Spans.of([0], [0, 1], [4])
    with pytest.raises(ValueError, match="1 source pages for 2 target pages"):
        Spans.of_pages([0], [0, 1], 4)


def test_the_library_is_compiled_once_and_found_again(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    load_library("span_copy", environment=environment)
    (library,) = (tmp_path / "pd-serve").iterdir()
    load_library("span_copy", environment={"XDG_CACHE_HOME": str(tmp_path), "PATH": "/nowhere"})
    assert list((tmp_path / "pd-serve").iterdir()) == [library]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"PATH": "/nowhere", "CC": ""}, "no C compiler found .cc, gcc or clang"),
        ({"CC": "no-such-compiler"}, "CC=no-such-compiler"),
        ({"CC": "false"}, "failed"),
        ({"XDG_CACHE_HOME": "", "HOME": ""}, "no place to keep the library"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "cannot be had"),
    ],
)
def test_a_machine_that_cannot_compile_says_why(tmp_path, changes, error):
    with pytest.raises(NativeUnavailable, match=error):
        load_library("span_copy", environment={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **changes})
