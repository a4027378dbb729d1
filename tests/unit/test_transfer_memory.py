"""Shared memory: sealed, handed over read-only, gone when nobody holds it; spans, cursors and checksums over it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_pools import open_fds

from transfer.checksum import page_checksums
from transfer.memory import PeerMemory, SharedMemory, host_id
from transfer.prefault import Prefault
from transfer.spans import blocks, checked_pages, coalesce, runs

PAGES = st.lists(st.integers(0, 20), max_size=30)


@pytest.mark.parametrize("prefault", [True, False])
def test_a_peer_sees_what_the_owner_writes_and_cannot_write_itself(prefault):
    with SharedMemory(10_000, prefault=prefault) as memory:
        peer = PeerMemory(os.dup(memory.fd), nbytes=10_000)
        memory.view[9_999] = 7
        assert peer.view[9_999] == 7
        assert peer.view.readonly
        peer.close()


def test_memory_can_neither_be_resized_nor_mapped_writable_by_others():
    with SharedMemory(4096) as memory:
        for size in (0, 8192):
            with pytest.raises(OSError, match="not permitted") as raised:
                os.ftruncate(memory.fd, size)
            assert raised.value.errno == errno.EPERM
        with pytest.raises(PermissionError):
            mmap.mmap(memory.fd, 4096)
        with pytest.raises(PermissionError):
            os.pwrite(memory.fd, b"x", 0)
        memory.view[0] = 1  # its owner still can


def test_memory_meant_to_be_shared_for_writing_can_still_not_be_resized():
    with SharedMemory(4096, shared_writable=True) as shared:
        with mmap.mmap(shared.fd, 4096) as theirs:
            theirs[7] = 7
        assert shared.view[7] == 7
        with pytest.raises(PermissionError):
            os.ftruncate(shared.fd, 8192)


def test_those_who_are_to_read_cannot_write_even_into_memory_that_is_shared_for_writing():
    with SharedMemory(4096, shared_writable=True) as shared:
        with pytest.raises(PermissionError):
            mmap.mmap(shared.reading_fd, 4096)
        with pytest.raises(ValueError, match="cannot be mapped"):
            PeerMemory(os.dup(shared.reading_fd), nbytes=4096, writable=True)
        shared.view[7] = 7
        theirs = PeerMemory(os.dup(shared.reading_fd), nbytes=4096)
        assert theirs.view[7] == 7
        theirs.close()


def test_another_process_can_write_only_where_that_was_meant_for_it():
    with SharedMemory(4096) as sealed, pytest.raises(ValueError, match="cannot be mapped"):
        PeerMemory(os.dup(sealed.fd), nbytes=4096, writable=True)
    with SharedMemory(4096, shared_writable=True) as shared:
        theirs = PeerMemory(os.dup(shared.fd), nbytes=4096, writable=True)
        theirs.view[7] = 7
        assert shared.view[7] == 7
        theirs.close()


def test_a_peers_memory_must_be_as_large_as_promised_and_sealed():
    with SharedMemory(4096) as memory, pytest.raises(ValueError, match="4096 bytes where its ticket promises 8192"):
        PeerMemory(os.dup(memory.fd), nbytes=8192)
    unsealed = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    fcntl.fcntl(unsealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    with pytest.raises(ValueError, match="not sealed against resizing"):
        PeerMemory(unsealed, nbytes=4096)
    no_memory, other_end = os.pipe()
    os.close(other_end)
    with pytest.raises(ValueError, match="the peer's memory"):
        PeerMemory(no_memory, nbytes=0)


def test_nothing_stays_open():
    before = open_fds()
    memory = SharedMemory(4096)
    array = np.frombuffer(memory.view, dtype=np.uint8)
    memory.close()
    memory.close()
    assert array[0] == 0  # still there for who refers to it
    del array, memory
    assert open_fds() == before


@pytest.mark.parametrize("nbytes", [0, -1])
def test_sizes_must_be_positive(nbytes):
    with pytest.raises(ValueError, match="must be positive"):
        SharedMemory(nbytes)


def test_more_memory_than_there_is_fails_where_it_is_asked_for():
    with pytest.raises(MemoryError, match="lower max_total_tokens"):
        SharedMemory(1 << 60)


@pytest.mark.parametrize("nbytes", [4096, (1 << 20) + 1])
def test_prefault_takes_the_memory_and_leaves_what_is_in_it(nbytes):
    with SharedMemory(nbytes, prefault=False) as memory:
        memory.view[nbytes - 1] = 7
        assert os.fstat(memory.fd).st_blocks * 512 < max(nbytes, 8192)
        prefault = Prefault(memory)
        prefault.start()
        assert prefault.wait(30)
        assert (prefault.error, memory.view[nbytes - 1]) == (None, 7)
        assert os.fstat(memory.fd).st_blocks * 512 >= nbytes
        prefault.stop(timeout_s=30)


def test_prefault_ends_when_it_is_stopped_or_was_never_started():
    with SharedMemory(64 << 20, prefault=False) as memory:
        Prefault(memory).stop(timeout_s=30)
        prefault = Prefault(memory)
        prefault.start()
        prefault.stop(timeout_s=30)
        assert prefault.wait(0)


def test_a_system_that_does_not_come_back_with_memory_is_not_waited_for_forever(monkeypatch):
    asked, answer = threading.Event(), threading.Event()

    def hang(start, nbytes):
        asked.set()
        assert answer.wait(30)

    with SharedMemory(4096, prefault=False) as memory:
        monkeypatch.setattr(memory, "populate", hang)
        prefault = Prefault(memory)
        prefault.start()
        assert asked.wait(30)
        with pytest.raises(TimeoutError, match="has not given the next 256 KiB of a KV pool within 0 s"):
            prefault.stop(timeout_s=0)
        answer.set()
        prefault.stop(timeout_s=30)


def test_prefault_keeps_what_the_system_said(monkeypatch):
    def refuse(start, nbytes):
        raise MemoryError("none left")

    with SharedMemory(4096, prefault=False) as memory:
        monkeypatch.setattr(memory, "populate", refuse)
        prefault = Prefault(memory)
        prefault.start()
        assert prefault.wait(30)
        assert str(prefault.error) == "none left"


def test_processes_of_one_host_agree_on_its_id():
    command = "from transfer.memory import host_id; print(host_id())"
    other = subprocess.run(
        [sys.executable, "-c", command], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == host_id()


def test_checksums_are_xxh3_of_each_page():
    data = bytes(range(100))
    found = page_checksums(memoryview(data), 10, [3, 0, 9])
    assert found == [xxhash.xxh3_64_intdigest(data[start : start + 10]) for start in (30, 0, 90)]
    assert page_checksums(memoryview(data), 10, []) == []
    for pages in ([10], [-1]):
        with pytest.raises(ValueError, match="of a pool of 10"):
            page_checksums(memoryview(data), 10, pages)


@settings(deadline=None, derandomize=True)
@given(PAGES, PAGES, st.integers(1, 7))
def test_spans_are_the_pages_in_order_and_as_few_as_can_be(source, target, max_pages):
    count = min(len(source), len(target))
    source, target = source[:count], target[:count]
    spans = coalesce(source, target)
    moves = [(span.source + i, span.target + i) for span in spans for i in range(span.length)]
    assert moves == list(zip(source, target, strict=True))
    for one, other in itertools.pairwise(spans):
        assert (one.source + one.length, one.target + one.length) != (other.source, other.target)
    pieces = list(blocks(spans, max_pages=max_pages))
    moves = [(span.source + i, span.target + i) for block in pieces for span in block for i in range(span.length)]
    assert moves == list(zip(source, target, strict=True))
    assert all(sum(span.length for span in block) == max_pages for block in pieces[:-1])


@settings(deadline=None, derandomize=True)
@given(PAGES)
def test_runs_are_the_pages_in_order(pages):
    found = runs(pages).tolist()
    assert [first + i for first, count in found for i in range(count)] == pages
    assert all(first + count != then for (first, count), (then, _) in itertools.pairwise(found))


def test_pages_outside_are_told():
    assert checked_pages([], num_pages=1, whose="our").tolist() == []
    assert checked_pages([0, 4], num_pages=5, whose="our").tolist() == [0, 4]
    for pages, found in (([5], "5 to 5"), ([3, -1], "-1 to 3"), ([0, 2**80], f"0 to {2**80}")):
        with pytest.raises(ValueError, match=f"pages {found} are not all in our pool of 5 pages"):
            checked_pages(pages, num_pages=5, whose="our")
