"""Peers in processes of their own, to be stopped and killed. Run as a program this is one such peer, or a nursery.

A nursery has everything imported and forks a peer in milliseconds, so that a schedule can afford to kill some.
Whoever makes a peer or a nursery closes it; both also end with the process that made them.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from transfer_pools import WAIT_S, ServedPool, closing, pattern

from protocol.handshake import RegionTicket
from protocol.rooms import PeerAddress
from transfer.checksum import page_checksums
from transfer.choice import TransportName
from transfer.disk.spool import Spool

_PR_SET_PDEATHSIG = 1
_MAX_BYTES = 64 << 10


class PeerOrder(msgspec.Struct, frozen=True, tag="peer"):
    """The first message to a peer: what it is to be."""

    boot: int
    page_bytes: int
    num_pages: int
    transport: TransportName
    folder: str
    file_limit: int


class OfferPages(msgspec.Struct, frozen=True, tag="offer"):
    """To a peer: have these pages written to the folder."""

    pages: list[int]


class AskContent(msgspec.Struct, frozen=True, tag="content"):
    """To a peer: answer with the checksums of all your pages."""


_ORDERS = msgspec.json.Decoder(PeerOrder | OfferPages | AskContent)


class Nursery:
    """Forks peers."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = _start("nursery", theirs)
        self.pid = self._process.pid

    def fork(self, sock: socket.socket) -> int:
        """The process id of a new peer that takes its orders from `sock`."""
        socket.send_fds(self._sock, [b"fork"], [sock.fileno()])
        return int(self._sock.recv(_MAX_BYTES))

    def close(self) -> None:
        self._sock.close()
        self._process.kill()
        self._process.wait(WAIT_S)


class PeerProcess:
    """A peer in a process of its own. With `file_limit` no file of it grows beyond that."""

    def __init__(
        self,
        *,
        boot: int,
        page_bytes: int = 4096,
        num_pages: int = 64,
        transport: TransportName = "auto",
        folder: Path | None = None,
        offered: Sequence[int] = (),
        file_limit: int = 0,
        nursery: Nursery | None = None,
    ) -> None:
        self.address = PeerAddress(f"replica-{boot}", boot, "127.0.0.1", 1)
        self.content = pattern(boot, page_bytes * num_pages).reshape(num_pages, page_bytes)
        self.sums = page_checksums(memoryview(self.content).cast("B"), page_bytes, range(num_pages))
        """The checksum of each page."""
        self.is_stopped = False
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(WAIT_S)
        with theirs:
            self._child = _start("peer", theirs) if nursery is None else None
            self.pid = nursery.fork(theirs) if nursery is not None else self._child.pid
        self._pidfd = os.pidfd_open(self.pid)
        place = "" if folder is None else str(folder)
        self._send(PeerOrder(boot, page_bytes, num_pages, transport, place, file_limit))
        self.ticket = msgspec.json.decode(self._sock.recv(_MAX_BYTES), type=RegionTicket)
        self.folder = Path(place) / self.ticket.doors.get("disk", "")
        if offered:
            self.offer(offered)

    @property
    def is_alive(self) -> bool:
        """Stopped or not."""
        return self._pidfd >= 0 and not select.select([self._pidfd], [], [], 0)[0]

    def page(self, page: int) -> bytes:
        return self.content[page].tobytes()

    def checksums(self, pages: Sequence[int]) -> list[int]:
        return [self.sums[page] for page in pages]

    def offer(self, pages: Sequence[int]) -> None:
        """Have it write these pages to its folder, some time."""
        self._send(OfferPages(list(pages)))

    def is_unchanged(self) -> bool:
        """Whether its pages still are what they were at the beginning; not to be asked of one that is stopped."""
        self._send(AskContent())
        return msgspec.json.decode(self._sock.recv(_MAX_BYTES), type=list[int]) == self.sums

    def stop(self) -> None:
        """SIGSTOP, and wait until it has taken effect."""
        os.kill(self.pid, signal.SIGSTOP)
        self.is_stopped = True
        deadline = time.monotonic() + WAIT_S
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, f"process {self.pid} does not stop"
            os.sched_yield()

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        self.is_stopped = False

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        assert select.select([self._pidfd], [], [], WAIT_S)[0], f"process {self.pid} does not end"
        self.is_stopped = False
        if self._child is not None:
            self._child.wait(WAIT_S)

    def close(self) -> None:
        if self._pidfd >= 0:
            if self.is_alive:
                self.kill()
            os.close(self._pidfd)
            self._pidfd = -1
        self._sock.close()

    def _send(self, order: PeerOrder | OfferPages | AskContent) -> None:
        self._sock.send(msgspec.json.encode(order), socket.MSG_NOSIGNAL)


def _start(what: str, sock: socket.socket) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, __file__, what, str(sock.fileno())],
        pass_fds=[sock.fileno()],
        env={**os.environ, "PYTHONPATH": path},
    )


# ---- in the other process -----------------------------------------------------------------------------------------


def be_peer(sock: socket.socket) -> None:
    """Serve a pool until the other end of `sock` is closed."""
    order = _ORDERS.decode(sock.recv(_MAX_BYTES))
    assert isinstance(order, PeerOrder)
    pool = ServedPool(
        boot=order.boot,
        page_bytes=order.page_bytes,
        num_pages=order.num_pages,
        transport=order.transport,
        folder=Path(order.folder) if order.folder else None,
    )
    with closing(pool):
        if order.file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_limit, order.file_limit))
        sock.send(msgspec.json.encode(pool.ticket))
        while data := sock.recv(_MAX_BYTES):
            match _ORDERS.decode(data):
                case OfferPages(pages):
                    (spool,) = (door for door in pool.doors if isinstance(door, Spool))
                    spool.offer(pages, pool.checksums(pages))
                case AskContent():
                    sock.send(msgspec.json.encode(pool.checksums(range(order.num_pages))))


def be_nursery(sock: socket.socket) -> None:
    """Fork a peer for each descriptor that comes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    while True:
        data, fds, _, _ = socket.recv_fds(sock, 16, 1)
        if not data:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sock.close()
            _end_with_parent()
            be_peer(socket.socket(fileno=fds[0]))
            os._exit(0)
        os.close(fds[0])
        sock.send(str(pid).encode())


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    _end_with_parent()
    {"peer": be_peer, "nursery": be_nursery}[sys.argv[1]](socket.socket(fileno=int(sys.argv[2])))
