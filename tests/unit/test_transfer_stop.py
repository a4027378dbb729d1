"""Ending fetches before their time: cancel, deadline, detach, close, at every stage. Each is answered once, drained."""

from __future__ import annotations

import os

import pytest
from peer_processes import PeerProcess
from transfer_pools import FakeClock, Gate, Receiver, ServedPool, closing, open_fds

from transfer.transport import TransferTimings

BIG = 64 << 20
"""More than the socket buffers between two ends ever hold."""


@pytest.fixture(params=["shm", "tcp"])
def transport(request):
    return request.param


@pytest.fixture
def pool():
    with closing(ServedPool(boot=7)) as (pool,):
        yield pool


@pytest.fixture
def large_pool():
    """Twelve pages of 1 MB: no transport takes them all in one piece, or in one turn."""
    with closing(ServedPool(boot=8, page_bytes=1 << 20, num_pages=12)) as (pool,):
        yield pool


def hold(receiver, pool, *, key="held", pages=range(40), deadline=float("inf")):
    """Start a fetch that its receiver's gate holds in the middle."""
    receiver.fetcher.attach(pool.address, pool.ticket)
    receiver.start(pool.address, list(pages), list(pages), key=key, deadline=deadline)
    assert receiver.fetcher._landing._faults.reached.wait(30)


def test_a_cancelled_copy_is_answered_only_when_it_has_ended(large_pool, transport):
    gate, pool = Gate(), large_pool
    with closing(Receiver(transport=transport, faults=gate, page_bytes=1 << 20, num_pages=12)) as (receiver,):
        hold(receiver, pool, pages=range(12))
        receiver.fetcher.cancel("held")
        receiver.fetcher.cancel("held")
        assert receiver.answers == 0  # a thread of ours is in the middle of it
        assert receiver.fetcher.num_jobs == 1
        gate.open()
        result = receiver.wait("held")
        assert receiver.answers == 1
        assert result.cancelled
        assert result.error.startswith("it was cancelled")
        assert receiver.page(11) == bytes(1 << 20)
        receiver.fetcher.cancel("held")  # too late
        receiver.fetcher.cancel("never heard of")
        assert receiver.fetch(pool.address, [1], [1]).ok


def test_a_waiting_copy_is_cancelled_at_once_while_another_runs(pool):
    gate = Gate(keys={"held"})
    with closing(Receiver(transport="shm", num_threads=1, faults=gate)) as (receiver,):
        hold(receiver, pool)
        receiver.start(pool.address, [1], [50], key="waiting")
        receiver.fetcher.cancel("waiting")
        result = receiver.wait("waiting")
        assert result.cancelled
        assert result.error == "it was cancelled; shm: stopped"
        gate.open()
        assert receiver.wait("held").ok
        assert receiver.page(50) == bytes(4096)


def test_a_cancelled_copy_is_not_tried_on_another_path(large_pool):
    gate = Gate(transport="shm")
    with closing(Receiver(faults=gate, page_bytes=1 << 20, num_pages=12)) as (receiver,):
        hold(receiver, large_pool, pages=range(12))
        receiver.fetcher.cancel("held")
        gate.open()
        result = receiver.wait("held")
        assert (result.cancelled, result.transport) == (True, "shm")


def test_a_copy_that_waits_for_a_hanging_handshake_is_cancelled_at_once(transport):
    with closing(PeerProcess(boot=1), Receiver(transport=transport, clock=FakeClock())) as (peer, receiver):
        peer.stop()
        receiver.fetcher.attach(peer.address, peer.ticket)
        for key in range(6):
            receiver.start(peer.address, [key], [key], key=key)
        receiver.fetcher.cancel(3)
        assert receiver.wait(3).cancelled
        receiver.fetcher.detach(peer.address)
        for key in (0, 1, 2, 4, 5):
            assert receiver.wait(key).error.startswith("its peer was detached")


def test_a_deadline_ends_a_copy_that_waits_for_its_turn(pool):
    clock, gate = FakeClock(), Gate(keys={"held"})
    with closing(Receiver(transport="shm", num_threads=1, clock=clock, faults=gate)) as (receiver,):
        hold(receiver, pool)
        receiver.start(pool.address, [1], [50], key="late", deadline=clock() - 1)
        receiver.start(pool.address, [2], [51], key="soon", deadline=clock() + 5)
        receiver.start(pool.address, [3], [52], key="patient", deadline=clock() + 500)
        assert receiver.wait("late").error.startswith("its deadline passed")
        clock.advance(6)
        result = receiver.wait("soon")
        assert result.error == "its deadline passed; shm: stopped"
        assert not result.cancelled
        gate.open()
        assert receiver.wait("patient").ok


def test_a_deadline_ends_a_copy_whose_peer_hangs():
    clock = FakeClock()
    with closing(PeerProcess(boot=1), Receiver(transport="tcp", clock=clock)) as (peer, receiver):
        receiver.fetcher.attach(peer.address, peer.ticket)
        assert receiver.fetch(peer.address, [1], [1]).ok
        peer.stop()
        receiver.start(peer.address, [2], [2], deadline=clock() + 5)
        clock.advance(6)
        assert receiver.wait().error.startswith("its deadline passed")


def test_detach_fences_the_running_and_the_waiting(large_pool, transport):
    gate, pool, sizes = Gate(keys={"held"}), large_pool, {"page_bytes": 1 << 20, "num_pages": 14}
    with closing(Receiver(transport=transport, faults=gate, num_threads=1, **sizes)) as (receiver,):
        hold(receiver, pool, pages=range(12))
        receiver.start(pool.address, [1], [12], key="waiting")
        receiver.fetcher.detach(pool.address)
        receiver.fetcher.detach(pool.address)
        assert "held" not in receiver.results
        receiver.start(pool.address, [1], [13], key="after")
        gate.open()
        assert "is not attached" in receiver.wait("after").error
        for key in ("held", "waiting"):
            result = receiver.wait(key)
            assert result.error.startswith("its peer was detached")
            assert not result.cancelled
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [1], [1]).ok


def test_detach_unmaps_when_the_last_copy_has_ended(pool):
    gate = Gate(keys={"held"})
    with closing(Receiver(transport="shm", faults=gate)) as (receiver,):
        hold(receiver, pool)
        mappings = _peer_mappings()
        receiver.fetcher.detach(pool.address)
        assert _peer_mappings() == mappings
        gate.open()
        receiver.wait("held")
        receiver.fetcher.close()
        assert _peer_mappings() == mappings - 1


def test_a_peer_can_come_back_while_its_last_copy_still_runs(pool, transport):
    gate = Gate(keys={"held"})
    with closing(Receiver(transport=transport, faults=gate)) as (receiver,):
        hold(receiver, pool)
        receiver.fetcher.detach(pool.address)
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.start(pool.address, [1], [50], key="new")
        gate.open()
        assert receiver.wait("new").ok
        result = receiver.wait("held")
        assert result.ok or result.error.startswith("its peer was detached")


def test_close_answers_everything_first(pool, transport):
    gate = Gate(keys={"held"})
    receiver = Receiver(transport=transport, faults=gate)
    hold(receiver, pool)
    for page in range(10):
        receiver.start(pool.address, [page], [page], key=page)
    gate.open()
    receiver.close()
    assert receiver.answers == 11


def test_close_says_when_a_copy_does_not_end(pool):
    gate = Gate()
    receiver = Receiver(transport="shm", faults=gate, timings=TransferTimings(close_s=0.05))
    hold(receiver, pool)
    with pytest.raises(TimeoutError, match="1 fetches have not ended"):
        receiver.fetcher.close()
    gate.open()
    receiver.wait("held")


def test_a_stopped_peer_holds_up_only_its_own_fetches(pool):
    pages, size = 64, BIG // 64
    gate = Gate(keys={"stuck"}, after_bytes=size)
    with closing(
        PeerProcess(boot=1, page_bytes=size, num_pages=pages),
        ServedPool(boot=2, page_bytes=size, num_pages=2),
        Receiver(transport="tcp", page_bytes=size, num_pages=pages + 2, faults=gate),
    ) as (stopped, healthy, receiver):
        receiver.fetcher.attach(stopped.address, stopped.ticket)
        receiver.fetcher.attach(healthy.address, healthy.ticket)
        receiver.start(stopped.address, list(range(pages)), list(range(pages)), key="stuck")
        assert gate.reached.wait(30)
        stopped.stop()  # in the middle of its payload
        gate.open()
        for key in range(3):
            receiver.start(stopped.address, [0], [pages], key=("more", key))
        assert receiver.fetch(healthy.address, [1], [pages + 1], checksums=healthy.checksums([1])).ok
        assert receiver.answers == 1
        receiver.fetcher.cancel("stuck")
        assert receiver.wait("stuck").cancelled
        receiver.fetcher.detach(stopped.address)
        for key in range(3):
            assert not receiver.wait(("more", key)).ok


def test_a_copy_whose_peer_falls_silent_ends_long_before_its_request(large_pool):
    """Of a peer whose links live on, say because only the packets of this connection go nowhere."""
    clock, limit_s = FakeClock(), TransferTimings().silence_s
    with closing(
        PeerProcess(boot=1, page_bytes=1 << 20, num_pages=64),
        Receiver(transport="tcp", clock=clock, page_bytes=1 << 20, num_pages=64),
    ) as (peer, receiver):
        receiver.fetcher.attach(peer.address, peer.ticket)
        assert receiver.fetch(peer.address, [1], [1]).ok
        peer.stop()
        receiver.start(peer.address, list(range(64)), list(range(64)), deadline=clock() + 1e6)
        result = receiver.wait_turning(clock, seconds=limit_s / 4)
        assert "no handshake within 3.0 s" in result.error  # with which it was to be asked once more
        assert clock() < 1000 + 20 * limit_s
        peer.resume()
        assert receiver.fetch(peer.address, [2], [2], checksums=peer.checksums([2])).ok


def test_a_peer_that_was_stopped_before_it_was_attached(transport):
    clock = FakeClock()
    with closing(PeerProcess(boot=1), Receiver(transport=transport, clock=clock)) as (peer, receiver):
        peer.stop()
        receiver.fetcher.attach(peer.address, peer.ticket)
        receiver.start(peer.address, [1], [1])
        result = receiver.wait_turning(clock, seconds=10)  # more than a handshake may take
        assert not result.ok
        assert "no handshake within 3.0 s" in result.error
        peer.resume()
        clock.advance(10)
        assert receiver.fetch(peer.address, [1], [1]).ok
        assert receiver.page(1) == peer.page(1)


def test_a_stopped_peers_shared_memory_stays_readable():
    with closing(PeerProcess(boot=1), Receiver(transport="shm")) as (peer, receiver):
        receiver.fetcher.attach(peer.address, peer.ticket)
        assert receiver.fetch(peer.address, [1], [1]).ok
        peer.stop()
        assert receiver.fetch(peer.address, [2], [2]).ok
        peer.kill()
        assert receiver.fetch(peer.address, [3], [3]).ok  # the memory lives until it is detached
        assert [receiver.page(page) for page in (1, 2, 3)] == [peer.page(page) for page in (1, 2, 3)]


def test_a_killed_peer_fails_its_fetches_at_once():
    pages, size = 64, BIG // 64
    gate = Gate(after_bytes=size)
    with closing(
        PeerProcess(boot=1, page_bytes=size, num_pages=pages),
        Receiver(transport="tcp", page_bytes=size, num_pages=pages, faults=gate),
    ) as (peer, receiver):
        receiver.fetcher.attach(peer.address, peer.ticket)
        receiver.start(peer.address, list(range(pages)), list(range(pages)))
        assert gate.reached.wait(30)
        peer.kill()
        gate.open()
        assert not receiver.wait().ok
        result = receiver.fetch(peer.address, [1], [1])
        assert not result.ok
        assert "Connection refused" in result.error


def test_a_restarted_peer_is_a_new_peer(transport):
    fds = open_fds()
    with closing(Receiver(transport=transport)) as (receiver,):
        for boot in (1, 2):
            with closing(PeerProcess(boot=boot)) as (peer,):
                receiver.fetcher.attach(peer.address, peer.ticket)
                assert receiver.fetch(peer.address, [5], [boot]).ok
                assert receiver.page(boot) == peer.page(5)
                receiver.fetcher.detach(peer.address)
    assert open_fds() == fds


def _peer_mappings() -> int:
    with open(f"/proc/{os.getpid()}/maps") as maps:
        return sum("pd-serve-kv" in line and " r--s" in line for line in maps)
