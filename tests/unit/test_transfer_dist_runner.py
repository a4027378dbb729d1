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
from transfer_pools import WAIT_S, closing, open_fds

from transfer.dist.giver import Giver
from transfer.dist.groups import NcclGroup, join
from transfer.dist.orders import Channel, ChannelError, Joined, Landed, RunnerOrder, TakePiece, make_order
from transfer.dist.parts import LONG_BYTES, messages
from transfer.dist.side import Side
from transfer.dist.store import PairStore
from transfer.dist.taker import Taker
from transfer.memory import PeerMemory, SharedMemory
from transfer.transport import TransferTimings
from transfer.wire import Status, WireError
from transfer.wire_requests import REPLY_BYTES, decode_reply, encode_request, pack_runs

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


def side(order: RunnerOrder, channel: Channel, connection: socket.socket, group, pool: PeerMemory) -> Side:
    """In this process, which no time limit ends."""
    return Side(
        order=order,
        channel=channel,
        connection=connection,
        group=group,
        pool=pool,
        limited=lambda seconds: contextlib.nullcontext(),
    )


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
    thread = threading.Thread(target=one.finish, daemon=True)
    thread.start()
    with pytest.raises(WireError, match="without 'never set'"):
        other.get("never set")
    other.finish()
    thread.join(WAIT_S)
    assert not thread.is_alive()


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

    def send(self, message, *, job):
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
        self.giver = Giver(side(order("give"), Channel(channel), theirs, group, pool))
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


class Ends:
    """A giver and a taker over gloo, each in a thread. `take` is the replica's end of the taker's channel."""

    def __init__(self, *, num_pages: int) -> None:
        here, there = socket.socketpair()
        self.take, taking = (Channel(sock) for sock in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self.give, giving = (Channel(sock) for sock in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        for sock in (here, there, self.take.sock, taking.sock, self.give.sock, giving.sock):
            sock.settimeout(WAIT_S)
        nbytes = num_pages * PAGE
        self.source, self.target = SharedMemory(nbytes), SharedMemory(nbytes, shared_writable=True)
        self.errors: list[Exception] = []
        both = [
            (Giver, order("give", num_pages=num_pages), giving, here, self.source, False),
            (Taker, order("take", num_pages=num_pages), taking, there, self.target, True),
        ]
        self._threads = [threading.Thread(target=self._run, args=one) for one in both]
        for thread in self._threads:
            thread.start()

    def piece(self, job: int, sources, targets) -> None:
        runs = [pack_runs(np.array(listed)) for listed in (sources, targets)]
        self.take.send(TakePiece(job=job, sources=runs[0], targets=runs[1], read_soon=job % 2 == 0))

    def close(self) -> None:
        self.take.sock.close()
        self.give.sock.close()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()

    def _run(self, runner, order, channel, connection, memory, writable) -> None:
        try:
            group = join(order, PairStore(connection, KEY, rank=int(writable)), host="127.0.0.1")
            pool = PeerMemory(os.dup(memory.fd), nbytes=memory.nbytes, writable=writable)
            runner(side(order, channel, connection, group, pool)).run()
        except Exception as error:
            self.errors.append(error)
        connection.close()  # as with its process
        channel.sock.close()


def test_pieces_of_long_and_short_runs_land_in_their_pages_and_nowhere_else():
    long, num_pages = LONG_BYTES // PAGE, 1600
    both = [(2 * i, 1) for i in range(30)], [(99 - i, 1) for i in range(30)]
    pieces = [
        ([(3, long + 1)], [(700, long + 1)]),  # received where it belongs
        ([(100 + 2 * i, 1) for i in range(300)], [(i, 1) for i in range(300)]),  # packed there, adjacent here
        ([(i, 1) for i in range(300)], [(999 - i, 1) for i in range(200)] + [(1598 - i, 1) for i in range(100)]),
        ([(0, 1), (7, long), (900, 2), (200, long)], [(400, 1), (500, long), (570, 2), (600, long)]),
        ([(9, 1)], [(1599, 1)]),
        ([*both[0], (700, long), *both[1]], [*both[1], (200, long), *both[0]]),  # packed before and after a long one
        ([(1599 - i, 1) for i in range(1600)], [((7 * i) % 1600, 1) for i in range(1600)]),  # packed in many
        ([((3 * i) % 1600, 1) for i in range(1600)], [(1599 - i, 1) for i in range(1600)]),
    ]
    with closing(Ends(num_pages=num_pages)) as (ends,):
        content = np.random.default_rng(0).integers(0, 256, (num_pages, PAGE), dtype=np.uint8)
        np.frombuffer(ends.source.view, dtype=np.uint8)[:] = content.reshape(-1)
        expected = np.zeros_like(content)
        assert ends.take.receive() == (Joined(), [])
        for job, (sources, targets) in enumerate(pieces, 1):
            ends.piece(job, sources, targets)
            for (source, count), (target, _) in zip(sources, targets, strict=True):
                expected[target : target + count] = content[source : source + count]
        assert [ends.take.receive()[0] for _ in pieces] == [Landed(job=job) for job in range(1, len(pieces) + 1)]
        assert np.array_equal(np.frombuffer(ends.target.view, dtype=np.uint8), expected.reshape(-1))
    assert ends.errors == []


def connections() -> dict[int, int]:
    """The TCP connections of this process: descriptor -> how many bytes may wait in it to be sent."""
    found = {}
    for fd in open_fds():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(fd))) as sock:
            if sock.family == socket.AF_INET and sock.getpeername():
                found[int(fd)] = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return found


def test_little_waits_in_a_connection_within_the_host():
    before = connections()
    with closing(Ends(num_pages=16)) as (ends,):
        assert ends.take.receive() == (Joined(), [])
        limits = [limit for fd, limit in connections().items() if fd not in before]
    assert len(limits) == 2
    assert max(limits) <= 1 << 20
    assert ends.errors == []


def test_a_piece_that_the_giver_refuses_ends_the_taker():
    with closing(Ends(num_pages=16)) as (ends,):
        assert ends.take.receive() == (Joined(), [])
        ends.piece(1, [(16, 1)], [(0, 1)])
        with pytest.raises(ChannelError):
            ends.take.receive()
    assert "the giver answers" in str(ends.errors[0])


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([1], [(0, 1)]),
        ([300], [(0, 1)]),
        ([1, 1, 1], [(0, 3)]),
        ([1, 64, 1], [(0, 1), (1, 2), (2, 3)]),
        ([64, 64], [(0, 1), (1, 2)]),
        ([64, 1, 1], [(0, 1), (1, 3)]),
        ([63, 63, 2, 1], [(0, 3), (3, 4)]),
        ([63] * 9, [(0, 2), (2, 6), (6, 9)]),
        ([1] * 2945, [(0, 128), (128, 384), (384, 896), (896, 1920), (1920, 2944), (2944, 2945)]),
        ([1, 64] + [1] * 257, [(0, 1), (1, 2), (2, 258), (258, 259)]),
    ],
)
def test_short_runs_share_a_message_and_long_ones_have_their_own(counts, expected):
    lengths = np.array(counts, dtype=np.int64) * PAGE
    assert [(part.start, part.stop) for part in messages(lengths)] == expected


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
