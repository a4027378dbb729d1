"""Parts of pages between pools of unequal shape: verified before they land, in many pieces, and refused where wrong."""

from __future__ import annotations

import socket
import struct

import msgspec
import numpy as np
import pytest
from transfer_pools import SECRET, Breaker, Gate, Receiver, closing

from protocol.handshake import PoolShape, new_nonce
from protocol.rooms import PeerAddress
from transfer.grains import PoolGrains
from transfer.layout import Cut, cut_between
from transfer.memory import SharedMemory
from transfer.server import PageServer
from transfer.wire import GREETING_BYTES, WELCOME_BYTES, Status, Want, connection_key, decode_greeting, encode_hello
from transfer.wire_requests import REPLY_BYTES, decode_reply, encode_request

THEIRS = PoolShape(model="a model", dtype="float32", layers=8, kv_heads=4, page_size=64, head_dim=64, total_kv_heads=4)
OURS = msgspec.structs.replace(THEIRS, kv_heads=2, page_size=16, tp_rank=1, tp_size=2)
THEIR_BYTES, OUR_BYTES = 1 << 20, 1 << 17
PAGES = 12
"""Of the peer: more than fits what transports stage at a time."""
GRAINS = 4 * PAGES


class UnequalPeer:
    """A peer whose pages are eight times as large as ours, in this process."""

    def __init__(self) -> None:
        self.memory = SharedMemory(PAGES * THEIR_BYTES)
        self.bytes = np.frombuffer(self.memory.view, dtype=np.uint8)
        self.bytes[:] = np.random.default_rng(1).integers(0, 256, self.memory.nbytes, dtype=np.uint8)
        self.server = PageServer(
            memory=self.memory,
            page_bytes=THEIR_BYTES,
            num_pages=PAGES,
            layout="theirs",
            shape=THEIRS,
            host="127.0.0.1",
            boot=7,
            secret=SECRET,
        )
        self.address = PeerAddress("peer", 7, "127.0.0.1", 1)
        self.ticket = self.server.ticket()

    def expected(self, grains) -> np.ndarray:
        """float32 bits `[grain, layers, heads, 2, tokens, dim]` that our rank wants."""
        pages = self.bytes.view(np.uint32).reshape(PAGES, 8, 4, 2, 4, 16, 64)
        return np.stack([pages[grain // 4, :, 2:, :, grain % 4] for grain in grains])

    def checksums(self, grains) -> list[int]:
        return PoolGrains(self.bytes, our_cut().source).checksums(grains)

    def close(self) -> None:
        self.server.close()
        del self.bytes
        self.memory.close()


def our_cut() -> Cut:
    cut = cut_between(THEIRS, THEIR_BYTES, OURS, OUR_BYTES)
    assert cut is not None
    return cut


def receiver(**options) -> Receiver:
    return Receiver(page_bytes=OUR_BYTES, num_pages=GRAINS, layout="ours", shape=OURS, **options)


def received(taker: Receiver, grains) -> np.ndarray:
    pages = np.frombuffer(taker.memory.view, dtype=np.uint32).reshape(GRAINS, 8, 2, 2, 16, 64)
    return pages[list(grains)].copy()


def nothing_landed(taker: Receiver) -> bool:
    return not np.frombuffer(taker.memory.view, dtype=np.uint8).any()


@pytest.fixture
def peer():
    with closing(UnequalPeer()) as (peer,):
        yield peer


@pytest.fixture(params=["shm", "tcp"])
def transport(request):
    return request.param


def take(taker: Receiver, peer: UnequalPeer, source, target, **options):
    taker.fetcher.attach(peer.address, peer.ticket)
    return taker.fetch(peer.address, source, target, **{"grain_tokens": 16, **options})


def test_many_grains_arrive_in_their_places(peer, transport):
    order = np.random.default_rng(2).permutation(GRAINS).tolist()
    with closing(receiver(transport=transport)) as (taker,):
        result = take(taker, peer, list(range(GRAINS)), order, checksums=peer.checksums(range(GRAINS)))
        assert result.ok
        assert (result.transport, result.bytes) == (transport, GRAINS * OUR_BYTES)
        assert np.array_equal(received(taker, order), peer.expected(range(GRAINS)))


def test_what_is_not_as_promised_never_lands(peer, transport):
    sums = peer.checksums([3])
    with closing(receiver(transport=transport)) as (taker,):
        result = take(taker, peer, [3], [0], checksums=[sums[0] ^ 1])
        assert not result.ok
        assert "grain 3 arrived with checksum" in result.error
        assert nothing_landed(taker)
        assert take(taker, peer, [3], [0], checksums=sums).ok


def test_pages_that_changed_since_they_were_offered_are_noticed(peer, transport):
    sums = peer.checksums([5])
    peer.bytes.view(np.uint32).reshape(PAGES, 8, 4, 2, 64, 64)[1, 7, 3, 1, 31, 63] ^= 1  # the grain's last number
    with closing(receiver(transport=transport)) as (taker,):
        assert not take(taker, peer, [5], [0], checksums=sums).ok
        assert nothing_landed(taker)


@pytest.mark.parametrize("faults", [Breaker(broken={"shm"}), Breaker(corrupting={"shm"})])
def test_a_failed_copy_is_tried_again_over_tcp(peer, faults):
    with closing(receiver(faults=faults)) as (taker,):
        result = take(taker, peer, [5, 6], [7, 8], checksums=peer.checksums([5, 6]))
        assert result.ok
        assert result.transport == "tcp"
        assert np.array_equal(received(taker, [7, 8]), peer.expected([5, 6]))


def test_a_copy_is_cancelled_between_its_pieces(peer, transport):
    gate = Gate(after_bytes=1)
    with closing(receiver(transport=transport, faults=gate)) as (taker,):
        taker.fetcher.attach(peer.address, peer.ticket)
        taker.start(peer.address, range(GRAINS), range(GRAINS), grain_tokens=16)
        assert gate.reached.wait(30)
        taker.fetcher.cancel("job")
        gate.open()
        assert taker.wait().cancelled
        assert take(taker, peer, [1], [1]).ok


def test_jobs_say_what_they_count_in(peer):
    with closing(receiver()) as (taker,):
        for tokens in (0, 8, 64):
            result = take(taker, peer, [1], [1], grain_tokens=tokens)
            assert result.error == f"the job counts in grains of {tokens} tokens, pages are taken in grains of 16"
        result = take(taker, peer, [GRAINS], [0])
        assert f"are not all in the peer's pool of {GRAINS}" in result.error
        with pytest.raises(ValueError, match=f"our pool of {GRAINS}"):
            take(taker, peer, [0], [GRAINS])


def test_a_transport_of_whole_pages_refuses_and_says_what_to_do(peer, tmp_path):
    with (
        closing(receiver(transport="disk", folder=tmp_path)) as (taker,),
        pytest.raises(ValueError, match="transport 'disk' takes whole pages only; set transport to auto, shm or tcp"),
    ):
        taker.fetcher.attach(peer.address, peer.ticket)


def test_an_equal_fingerprint_does_not_make_equal_ranks(peer):
    """Two ranks of one model have pages of one size and of different heads."""
    theirs = msgspec.structs.replace(OURS, tp_rank=0)
    ticket = msgspec.structs.replace(peer.ticket, layout="ours", page_bytes=OUR_BYTES, shape=theirs)
    with closing(receiver()) as (taker,), pytest.raises(ValueError, match="attach a rank that shares some"):
        taker.fetcher.attach(peer.address, ticket)


def test_what_means_something_else_is_refused_with_both_values(peer):
    other = msgspec.structs.replace(peer.ticket, shape=msgspec.structs.replace(THEIRS, dtype="bfloat16"))
    shapeless = msgspec.structs.replace(peer.ticket, shape=None)
    with closing(receiver()) as (taker,):
        with pytest.raises(ValueError, match="dtype is 'bfloat16' there and 'float32' here"):
            taker.fetcher.attach(peer.address, other)
        with pytest.raises(ValueError, match="run the same model, dtype and page size on both"):
            taker.fetcher.attach(peer.address, shapeless)


class Asker:
    """A connection for grains (or for 8 bits), past its handshake."""

    def __init__(self, peer, *, want: Want = Want.GRAINS) -> None:
        self.sock = socket.create_connection((peer.ticket.tcp_host, peer.ticket.tcp_port), timeout=30)
        nonce, theirs = new_nonce(), decode_greeting(self.receive(GREETING_BYTES))
        self.sock.sendall(encode_hello(SECRET, theirs, want=want, boot=7, nonce=nonce))
        self.receive(WELCOME_BYTES)
        self.key = connection_key(SECRET, theirs, nonce)

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            assert part, "closed"
            data += part
        return data

    def ask(self, job: int, ask: tuple[int, int, int], runs, *, grain_bytes: int = OUR_BYTES):
        """`ask` is tokens, first head, heads."""
        packed = struct.pack(">III", *ask)
        self.sock.sendall(encode_request(self.key, boot=7, job=job, runs=runs, page_bytes=grain_bytes, ask=packed))
        return decode_reply(self.key, self.receive(REPLY_BYTES))

    def close(self) -> None:
        self.sock.close()


@pytest.mark.parametrize(
    ("ask", "runs", "grain_bytes"),
    [
        ((0, 0, 2), [(0, 1)], OUR_BYTES),
        ((15, 0, 2), [(0, 1)], OUR_BYTES),
        ((128, 0, 2), [(0, 1)], OUR_BYTES),
        ((16, 0, 0), [(0, 1)], 0),
        ((16, 0, 5), [(0, 1)], OUR_BYTES),
        ((16, 3, 2), [(0, 1)], OUR_BYTES),
        ((16, 2**32 - 1, 2), [(0, 1)], OUR_BYTES),
        ((16, 0, 2), [(GRAINS, 1)], OUR_BYTES),
        ((16, 0, 2), [(0, GRAINS + 1)], OUR_BYTES),
        ((16, 0, 2), [(5, 2**32 - 1)], OUR_BYTES),
        ((16, 0, 2), [(0, 0)], OUR_BYTES),
        ((16, 0, 2), [(0, 1)], OUR_BYTES - 1),
    ],
)
def test_grains_that_the_pool_does_not_have_are_refused(peer, ask, runs, grain_bytes):
    with closing(Asker(peer)) as (asker,):
        assert asker.ask(1, ask, runs, grain_bytes=grain_bytes).status is Status.BAD_PAGES
        reply = asker.ask(2, (16, 2, 2), [(4, 2)])
        assert (reply.status, reply.byte_length) == (Status.OK, 2 * OUR_BYTES)
        assert asker.receive(2 * OUR_BYTES) == peer.expected([4, 5]).tobytes()


def test_a_bug_of_the_giver_ends_the_connection_at_once(peer, monkeypatch):
    def fail(*_):
        raise ValueError("a bug")

    with closing(Asker(peer)) as (asker,), monkeypatch.context() as patch:
        patch.setattr(PoolGrains, "gather", fail)
        assert asker.ask(1, (16, 2, 2), [(4, 2)]).status is Status.OK
        with pytest.raises(AssertionError, match="closed"):
            asker.receive(1)
    with closing(Asker(peer)) as (asker,):
        assert asker.ask(1, (16, 2, 2), [(4, 2)]).status is Status.OK
        assert asker.receive(2 * OUR_BYTES) == peer.expected([4, 5]).tobytes()
