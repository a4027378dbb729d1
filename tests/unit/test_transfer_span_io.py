"""Spans through sockets and out of files: every byte in its place and no other touched, compiled or not."""

from __future__ import annotations

import os
import socket
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.cursor import RangeCursor
from transfer.span_io import SpanCursor, read_spans, socket_spans

SIZE = 300_000
SOURCE = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
WAYS = pytest.mark.parametrize("native", [True, False], ids=["native", "python"])


@st.composite
def ranges(draw: st.DrawFn, *, apart: bool = False) -> np.ndarray:
    """int64 [2, ranges]: offsets and lengths, not overlapping where they must be apart."""
    found, end = [], 0
    for length in draw(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 5_000)), max_size=12)):
        offset = end + draw(st.integers(0, 70)) if apart else draw(st.integers(0, SIZE - length))
        found.append((offset, length))
        end = offset + length
    return np.array(draw(st.permutations(found)), dtype=np.int64).reshape(-1, 2).T


def many(count: int, length: int) -> np.ndarray:
    """More ranges than one system call takes."""
    offsets = np.random.default_rng(2).permutation(SIZE // length)[:count] * length
    return np.stack([offsets, np.full(count, length)])


def bytes_of(memory: np.ndarray, listed: np.ndarray) -> bytes:
    return b"".join(memory[offset : offset + length].tobytes() for offset, length in listed.T.tolist())


@pytest.fixture
def sockets():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def drain(sock: socket.socket, limit: int) -> bytes:
    try:
        return sock.recv(limit)
    except BlockingIOError:
        return b""


@WAYS
def test_the_machine_has_the_compiled_code_and_can_do_without(native):
    spans = socket_spans(memoryview(SOURCE), *many(3, 100), call_bytes=1000, native=native)
    assert isinstance(spans, SpanCursor if native else RangeCursor)


@WAYS
@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    listed=st.one_of(ranges(), st.just(many(400, 200))), call_bytes=st.integers(100, 10_000), seed=st.integers(0, 999)
)
def test_every_byte_is_sent_once_and_in_order(native, listed, call_bytes, seed):
    random, (ours, theirs) = Random(seed), socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        spans = socket_spans(memoryview(SOURCE), *listed, call_bytes=call_bytes, native=native)
        expected, seen = bytes_of(SOURCE, listed), b""
        assert spans.left == len(expected)
        while spans.left:
            before = spans.left
            try:
                sent = spans.send(ours)
                assert 0 < sent == before - spans.left
            except BlockingIOError:
                assert spans.left == before
            seen += drain(theirs, random.randint(1, 20_000))
        while len(seen) < len(expected):
            seen += drain(theirs, 1 << 20)
        assert seen == expected


@WAYS
@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    listed=st.one_of(ranges(apart=True), st.just(many(400, 200))),
    call_bytes=st.integers(100, 10_000),
    seed=st.integers(0, 999),
)
def test_every_byte_is_received_in_its_place_and_no_other_touched(native, listed, call_bytes, seed):
    random, (ours, theirs) = Random(seed), socket.socketpair()
    memory, expected = np.zeros((2, SIZE), dtype=np.uint8)
    for offset, length in listed.T.tolist():
        expected[offset : offset + length] = SOURCE[offset : offset + length]
    coming = memoryview(bytes_of(SOURCE, listed) + b"not for these spans")
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        spans = socket_spans(memoryview(memory), *listed, call_bytes=call_bytes, native=native)
        while spans.left:
            before = spans.left
            try:
                received = spans.receive(ours)
                assert 0 < received == before - spans.left
            except BlockingIOError:
                coming = coming[theirs.send(coming[: random.randint(1, 20_000)]) :]
        assert np.array_equal(memory, expected)


@WAYS
def test_the_end_of_a_connection_and_its_errors_are_told(sockets, native):
    ours, theirs = sockets
    memory = np.zeros(100, dtype=np.uint8)
    spans = socket_spans(memoryview(memory), *np.array([[0], [100]]), call_bytes=50, native=native)
    with pytest.raises(BlockingIOError):
        spans.receive(ours)
    theirs.close()
    assert spans.receive(ours) == 0
    with pytest.raises(BrokenPipeError):
        spans.send(ours)
    assert spans.left == 100


@WAYS
@pytest.mark.parametrize("span", [(-1, 5), (90, 11), (5, -1), (2**62, 2**62)])
def test_spans_outside_the_memory_are_refused(native, span):
    memory = memoryview(bytearray(100))
    with pytest.raises(ValueError, match="of a memory of 100 bytes"):
        socket_spans(memory, *np.array([(0, 10), span]).T, call_bytes=50, native=native)


@WAYS
def test_the_memory_is_let_go(native):
    memory = bytearray(100)
    view = memoryview(memory)
    spans = socket_spans(view, *np.array([[0], [100]]), call_bytes=50, native=native)
    spans.drop()
    assert spans.left == 0
    view.release()
    memory.append(1)  # or a BufferError


@WAYS
@settings(deadline=None, derandomize=True, max_examples=40)
@given(data=st.data(), size=st.integers(1, 900), count=st.integers(1, 300))
def test_pages_are_read_out_of_files(tmp_path_factory, native, data, size, count):
    folder = tmp_path_factory.mktemp("packs")
    content = [SOURCE[: 100 * size], SOURCE[-100 * size :]]
    fds = []
    try:
        for number, pages in enumerate(content):
            (folder / str(number)).write_bytes(pages.tobytes())
            fds.append(os.open(folder / str(number), os.O_RDONLY))
        seed = data.draw(st.integers(0, 1000))
        random = np.random.default_rng(seed)
        runs = data.draw(st.booleans())  # pages that follow each other, or not
        files = random.integers(0, 2, count) if not runs else np.arange(count) // 100 % 2
        pages = random.integers(0, 100, count) if not runs else np.arange(count) % 100
        targets = random.permutation(SIZE // size)[:count] if data.draw(st.booleans()) else np.arange(count)
        memory, expected = np.zeros((2, SIZE), dtype=np.uint8)
        for file, page, target in zip(files, pages, targets, strict=True):
            expected[target * size : (target + 1) * size] = content[file][page * size : (page + 1) * size]
        chosen, places = [fds[file] for file in files], (pages * size).tolist()
        assert read_spans(chosen, places, memory, targets * size, size, native=native) == count
        assert np.array_equal(memory, expected)
    finally:
        for fd in fds:
            os.close(fd)


@WAYS
def test_what_a_file_does_not_have_is_told(tmp_path, native):
    memory = np.zeros(100, dtype=np.uint8)
    (tmp_path / "pack").write_bytes(b"x" * 25)
    with open(tmp_path / "pack", "rb") as file:
        files = [file.fileno()] * 3
        assert read_spans(files, [0, 20, 10], memory, np.array([0, 10, 20]), 10, native=native) == 1
        assert read_spans(files, [0, 10, 20], memory, np.array([0, 20, 40]), 10, native=native) == 2
        with pytest.raises(ValueError, match="of a memory of 100 bytes"):
            read_spans(files, [0, 0, 10], memory, np.array([0, 91, 20]), 10, native=native)
    with pytest.raises(OSError, match=r"[Bb]ad file descriptor"):
        read_spans([-1], [0], memory, np.array([0]), 10, native=native)
