"""Inside the helper processes of process groups: the rendezvous, and what a giver makes of what it is asked for."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import socket
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transfer_pools import WAIT_S, open_fds

from transfer.dist.giver import Giver
from transfer.dist.groups import GlooGroup, NcclGroup
from transfer.dist.helpers import make_order
from transfer.dist.orders import Channel, ChannelError, Joined, RunnerOrder
from transfer.dist.store import PairStore
from transfer.memory import PeerMemory, SharedMemory
from transfer.transport import TransferTimings
from transfer.wire import Status, WireError
from transfer.wire_requests import REPLY_BYTES, decode_reply, encode_request

KEY = hashlib.sha256(b"a connection").digest()
PAGE = 4096


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        for sock in (one, other):
            sock.settimeout(WAIT_S)
        yield one, other


def order(role: str, *, num_pages: int = 16) -> RunnerOrder:
    return make_order(role, "gloo", key=KEY, boot=7, num_pages=num_pages, page_bytes=PAGE, timings=TransferTimings())


# ---- the rendezvous -------------------------------------------------------------------------------------------


def test_each_side_of_a_rendezvous_learns_what_the_other_set(sockets):
    one, other = (PairStore(sock, KEY, rank=rank) for rank, sock in enumerate(sockets))
    one.set("a", b"1")
    other.set("b", "2")
    one.wait(["a", "b"])
    assert (one.get("b"), other.get("a"), other.get("b")) == (b"2", b"1", b"2")
    thread = threading.Thread(target=one.finish)
    thread.start()
    other.finish()
    thread.join(WAIT_S)
    one.set("late", b"3")
    with pytest.raises(WireError, match="finished the rendezvous without 'late'"):
        other.get("late")
    sockets[0].sendall(b"x")  # and the connection is free
    assert sockets[1].recv(10) == b"x"


def test_a_side_that_finishes_early_is_no_endless_wait(sockets):
    one, other = (PairStore(sock, KEY, rank=rank) for rank, sock in enumerate(sockets))
    threading.Thread(target=one.finish, daemon=True).start()
    with pytest.raises(WireError, match="without 'never set'"):
        other.get("never set")
    other.finish()


def frame(key: bytes, *, rank: int = 1, index: int = 0, value: bytes = b"v", length: int | None = None) -> bytes:
    head = struct.pack(">BBHI", rank, 1, 1, len(value) if length is None else length)
    tag = hmac.digest(key, b"rendezvous" + struct.pack(">I", index) + head + b"k" + value, "sha256")[:16]
    return head + tag + b"k" + value


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (frame(b"another key"), "wrong tag"),
        (frame(KEY, rank=0), "wrong tag"),
        (frame(KEY, index=1), "wrong tag"),
        (frame(KEY, length=1 << 31), "too much"),
        (frame(KEY)[:-1], "closed the connection"),
        (b"", "closed the connection"),
    ],
    ids=["key", "echoed", "replayed", "huge", "cut short", "nothing"],
)
def test_a_frame_that_the_other_side_did_not_make_ends_the_rendezvous(sockets, data, error):
    store = PairStore(sockets[0], KEY, rank=0)
    sockets[1].sendall(data)
    sockets[1].shutdown(socket.SHUT_WR)
    with pytest.raises(WireError, match=error):
        store.get("k")


def test_a_good_frame_is_what_the_bad_ones_differ_from(sockets):
    sockets[1].sendall(frame(KEY))
    assert PairStore(sockets[0], KEY, rank=0).get("k") == b"v"


def test_endless_frames_end_the_rendezvous(sockets):
    store = PairStore(sockets[0], KEY, rank=0)
    for index in range(65):
        sockets[1].sendall(frame(KEY, index=index))
    with pytest.raises(WireError, match="too much"):
        store.get("never set")


# ---- the giver ------------------------------------------------------------------------------------------------


class Unused:
    """A group that nothing may be sent through."""

    def send(self, pages, runs, *, job):
        raise AssertionError(f"job {job} was answered")


class GiverThread:
    """A giver over 16 pages, in a thread; `ask` is the taker's end of its connection."""

    def __init__(self, group) -> None:
        self.ask, theirs = socket.socketpair()
        replica, channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.replica = Channel(replica)
        for sock in (self.ask, theirs, replica, channel):
            sock.settimeout(WAIT_S)
        self.memory = SharedMemory(16 * PAGE)
        self.memory.view[:] = bytes(page for page in range(16) for _ in range(PAGE))
        pool = PeerMemory(os.dup(self.memory.fd), nbytes=16 * PAGE)
        self.giver = Giver(
            order("give"), Channel(channel), theirs, group, pool, lambda seconds: contextlib.nullcontext()
        )
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def request(self, job: int, runs, *, key: bytes = KEY, boot: int = 7) -> None:
        self.ask.sendall(encode_request(key, boot=boot, job=job, runs=runs, page_bytes=PAGE))

    def reply(self):
        return decode_reply(KEY, self.ask.recv(REPLY_BYTES, socket.MSG_WAITALL))

    def end(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.ask.close()
        self.end()

    def _run(self) -> None:
        try:
            self.giver.run()
        except Exception as error:
            self.error = error


@pytest.mark.parametrize(
    "runs", [[(16, 1)], [(10, 7)], [(0, 0)], [(0, 16), (0, 1)] * 64, [(2**32 - 1, 2**32 - 1)]],
    ids=["behind the end", "over the end", "empty", "more than a piece", "overflowing"],
)  # fmt: skip
def test_pages_that_are_not_there_are_refused_and_the_next_request_is_heard(runs):
    giver = GiverThread(Unused())
    giver.request(1, runs)
    assert giver.reply().status is Status.BAD_PAGES
    giver.request(2, [(99, 1)])
    reply = giver.reply()
    assert (reply.status, reply.job, reply.byte_length) == (Status.BAD_PAGES, 2, 0)
    giver.close()
    assert giver.error is None


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"job": 1, "runs": [(0, 1)], "key": b"another"}, "tag is wrong"),
        ({"job": 0, "runs": [(0, 1)]}, "not the next one"),
        ({"job": 1, "runs": [(0, 1)], "boot": 8}, "not the next one"),
        ({"job": 1, "runs": [(0, 1)] * 2049}, "2049 runs"),
    ],
    ids=["tag", "old job", "boot", "too many runs"],
)
def test_a_request_that_the_taker_did_not_make_ends_the_giver(options, error):
    giver = GiverThread(Unused())
    giver.request(**options)
    giver.end()
    assert isinstance(giver.error, WireError)
    assert error in str(giver.error)
    giver.close()


def test_an_old_request_again_ends_the_giver():
    giver = GiverThread(Unused())
    giver.request(5, [(99, 1)])
    assert giver.reply().job == 5
    giver.request(5, [(99, 1)])
    giver.end()
    assert "not the next one" in str(giver.error)
    giver.close()


def test_a_giver_ends_with_its_replica_and_with_its_taker():
    for leave in (lambda giver: giver.replica.sock.close(), lambda giver: giver.ask.close()):
        giver = GiverThread(Unused())
        assert giver.replica.receive() == (Joined(), [])
        leave(giver)
        giver.end()
        assert giver.error is None
        giver.close()


# ---- groups ---------------------------------------------------------------------------------------------------


def test_pieces_of_one_and_of_many_runs_go_through_gloo_in_order(sockets):
    stores = [PairStore(sock, KEY, rank=rank) for rank, sock in enumerate(sockets)]
    groups: dict[int, GlooGroup] = {}

    def meet(rank: int) -> None:
        groups[rank] = GlooGroup(order("give" if rank == 0 else "take"), stores[rank], rank, "127.0.0.1")

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    pages = np.arange(16 * PAGE, dtype=np.uint32).astype(np.uint8).reshape(16, PAGE)
    pages += np.arange(16, dtype=np.uint8)[:, None]
    pieces = [[(3, 2)], [(0, 1), (9, 3)], [(5, 1), (2, 2), (0, 1)]]
    slots = torch.zeros((3, 5 * PAGE), dtype=torch.uint8)
    waits = []
    for job, runs in enumerate(pieces):
        lengths = [count * PAGE for _, count in runs]
        waits.append(groups[1].receive(slots[job][: sum(lengths)], lengths, job=job))
    waits += [groups[0].send(pages, runs, job=job) for job, runs in enumerate(map(np.array, pieces))]
    for wait in waits:
        wait.wait()
    for job, runs in enumerate(pieces):
        expected = b"".join(pages[first : first + count].tobytes() for first, count in runs)
        assert slots[job].numpy().tobytes() == expected.ljust(5 * PAGE, b"\0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_says_so(sockets):
    with pytest.raises(RuntimeError, match=r"nccl needs an NVIDIA GPU .* set transfer\.transport to gloo or auto"):
        NcclGroup(order("give"), PairStore(sockets[0], KEY, rank=0), 0)


def test_a_channel_closes_descriptors_that_came_with_nonsense():
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other, SharedMemory(PAGE) as memory:
        before = open_fds()
        socket.send_fds(one, [b"\xc1 nonsense"], [memory.fd])
        with pytest.raises(ChannelError):
            Channel(other).receive()
        assert open_fds() == before
