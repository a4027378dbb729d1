"""Pages between two processes' pools in the memory of a real GPU, by CUDA IPC."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from protocol.handshake import RegionTicket
from protocol.rooms import PeerAddress
from tests.gpu.gpu_peer import LAYOUT, content
from transfer.checksum import page_checksums
from transfer.cuda.library import CudaDriver, CudaUnavailable
from transfer.cuda.memory import DeviceMemory
from transfer.fetcher import FetchJob, FetchResult, PageFetcher

pytestmark = pytest.mark.gpu

PAGE, PAGES = 64 << 10, 512
WAIT_S = 60.0


class Peer:
    """A process with a pool in GPU memory."""

    def __init__(self, boot: int) -> None:
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("gpu_peer.py")), str(boot), str(PAGE), str(PAGES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        assert self._process.stdout is not None
        self.ticket = msgspec.json.decode(self._process.stdout.readline(), type=RegionTicket)
        self.address = PeerAddress(f"replica-{boot}", boot, "127.0.0.1", 1)
        self.content = content(boot, PAGE * PAGES)

    def page(self, page: int) -> bytes:
        return self.content[page * PAGE : (page + 1) * PAGE]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(WAIT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Receiver:
    """A fetcher into GPU memory."""

    def __init__(self) -> None:
        self.memory = DeviceMemory(CudaDriver(), PAGE * PAGES)
        self.fetcher = PageFetcher(memory=self.memory, page_bytes=PAGE, layout=LAYOUT, secret=b"secret")

    def fetch(self, peer: Peer, source: list[int], target: list[int], *, verified: bool) -> FetchResult:
        checksums = page_checksums(memoryview(peer.content), PAGE, source) if verified else []
        done, results = threading.Event(), list[FetchResult]()
        job = FetchJob(key=0, peer=peer.address, source_pages=source, target_pages=target, checksums=checksums)
        self.fetcher.fetch(job, lambda result: (results.append(result), done.set()))
        assert done.wait(WAIT_S), "never answered"
        return results[0]

    def page(self, page: int) -> bytes:
        return bytes(self.memory.read(page * PAGE, PAGE))

    def close(self) -> None:
        self.fetcher.close()
        self.memory.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    try:
        receiver = Receiver()
    except CudaUnavailable as error:
        pytest.skip(str(error))
    yield receiver
    receiver.close()


@pytest.fixture
def peer(receiver: Receiver) -> Iterator[Peer]:
    peer = Peer(7)
    receiver.fetcher.attach(peer.address, peer.ticket)
    yield peer
    receiver.fetcher.detach(peer.address)
    peer.kill()


@pytest.mark.parametrize("verified", [True, False])
def test_pages_arrive_where_they_were_wanted_and_nowhere_else(receiver: Receiver, peer: Peer, verified: bool) -> None:
    source, target = list(range(100, 400)), [page * 7 % PAGES for page in range(300)]
    result = receiver.fetch(peer, source, target, verified=verified)
    assert (result.ok, result.transport, result.error) == (True, "cuda", None)
    for page in range(PAGES):
        expected = peer.page(source[target.index(page)]) if page in target else bytes(PAGE)
        assert receiver.page(page) == expected


def test_wrong_pages_are_found(receiver: Receiver, peer: Peer) -> None:
    peer.content = content(8, PAGE * PAGES)
    result = receiver.fetch(peer, [1], [1], verified=True)
    assert "arrived with checksum" in str(result.error)


def test_a_killed_peers_memory_is_right_or_fails_and_harms_nobody(receiver: Receiver, peer: Peer) -> None:
    assert receiver.fetch(peer, [1], [1], verified=True).ok
    peer.kill()
    result = receiver.fetch(peer, [2], [2], verified=True)
    assert not result.ok or receiver.page(2) == peer.page(2)
    receiver.fetcher.detach(peer.address)
    another = Peer(9)
    receiver.fetcher.attach(another.address, another.ticket)
    assert receiver.fetch(another, [3], [3], verified=True).ok
    assert receiver.page(3) == another.page(3)
    receiver.fetcher.detach(another.address)
    another.kill()
