"""Fetching pages, over each transport: the right bytes in the right places, verified, or an answer that says why
not."""

from __future__ import annotations

import threading

import msgspec
import pytest
from transfer_pools import LAYOUT, Breaker, Bug, FakeClock, Gate, Receiver, ServedPool, closing, open_fds

from protocol.rooms import PeerAddress
from transfer.fetcher import FetchJob, PageFetcher
from transfer.memory import SharedMemory

TRANSPORTS = ["shm", "tcp"]


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    return request.param


@pytest.fixture
def pool():
    with closing(ServedPool(boot=7)) as (pool,):
        yield pool


def test_pages_arrive_in_their_places_and_nowhere_else(pool, transport):
    source, target = [3, 4, 5, 40, 9, 8, 63], [10, 11, 12, 0, 50, 51, 33]
    with closing(Receiver(transport=transport)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        result = receiver.fetch(pool.address, source, target, checksums=pool.checksums(source))
        assert result.ok
        assert result.error is None
        assert (result.transport, result.bytes) == (transport, len(source) * 4096)
        assert result.seconds >= 0 <= result.queued_seconds
        for page in range(64):
            expected = pool.page(source[target.index(page)]) if page in target else bytes(4096)
            assert receiver.page(page) == expected


@pytest.mark.parametrize("page_bytes", [1, 1000, 64 << 10, 3 << 20])
def test_any_page_size_works(transport, page_bytes):
    pool = ServedPool(boot=2, page_bytes=page_bytes, num_pages=9)
    with closing(pool, Receiver(transport=transport, page_bytes=page_bytes, num_pages=9)) as (_, receiver):
        receiver.fetcher.attach(pool.address, pool.ticket)
        source, target = [0, 1, 2, 8, 5], [4, 5, 6, 7, 0]
        assert receiver.fetch(pool.address, source, target, checksums=pool.checksums(source)).ok
        assert [receiver.page(page) for page in target] == [pool.page(page) for page in source]


def test_many_fetches_use_one_mapping_and_few_connections(pool, transport):
    with closing(Receiver(transport=transport)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        for page in range(64):
            assert receiver.fetch(pool.address, [page], [63 - page]).ok
        assert [receiver.page(63 - page) for page in range(64)] == [pool.page(page) for page in range(64)]
        assert pool.server.num_connections == (1 if transport == "tcp" else 0)


def test_many_fetches_at_once_share_few_connections(pool):
    with closing(Receiver(transport="tcp")) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        for page in range(64):
            receiver.start(pool.address, [page], [page], key=page, checksums=pool.checksums([page]))
        assert all(receiver.wait(page).ok for page in range(64))
        assert pool.server.num_connections <= 4


def test_a_wrong_checksum_fails_the_fetch(pool, transport):
    with closing(Receiver(transport=transport)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        sums = pool.checksums([1, 2, 3])
        result = receiver.fetch(pool.address, [1, 2, 3], [1, 2, 3], checksums=[sums[0], sums[1] ^ 1, sums[2]])
        assert not result.ok
        assert not result.cancelled
        assert "page 2 arrived with checksum" in result.error
        assert receiver.fetch(pool.address, [1, 2, 3], [1, 2, 3], checksums=[sums[0], 0, sums[2]]).ok  # 0: not verified


def test_bytes_changed_on_the_way_are_noticed(pool, transport):
    with closing(Receiver(transport=transport, faults=Breaker(corrupting={transport}))) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert not receiver.fetch(pool.address, [5], [5], checksums=pool.checksums([5])).ok
        assert receiver.fetch(pool.address, [5], [5]).ok  # nobody asked for verification


def test_a_bug_fails_its_copy_at_once_and_no_other(pool, transport):
    bug = Bug(transports={transport})
    with closing(Receiver(transport=transport, faults=bug, clock=FakeClock())) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        for _ in range(3):  # more than there are threads
            result = receiver.fetch(pool.address, [5], [5], checksums=pool.checksums([5]))
            assert not result.ok
            assert "ValueError('a bug')" in result.error
        bug.transports.clear()
        assert receiver.fetch(pool.address, [5], [5], checksums=pool.checksums([5])).ok


@pytest.mark.parametrize("faults", [Breaker(broken={"shm"}), Breaker(corrupting={"shm"})])
def test_a_failed_copy_is_tried_again_over_tcp(pool, faults):
    with closing(Receiver(faults=faults)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        result = receiver.fetch(pool.address, [5, 6], [7, 8], checksums=pool.checksums([5, 6]))
        assert result.ok
        assert result.transport == "tcp"
        assert receiver.page(7) == pool.page(5)
        faults.broken, faults.corrupting = set(), set()
        assert receiver.fetch(pool.address, [5], [7]).transport == "shm"  # nothing is held against it


def test_a_fetch_that_fails_on_every_path_names_them_all(pool):
    with closing(Receiver(faults=Breaker(broken={"shm", "tcp"}))) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        result = receiver.fetch(pool.address, [5], [5])
        assert not result.ok
        assert "shm: shm is broken on purpose" in result.error
        assert "tcp: tcp is broken on purpose" in result.error


def test_a_peer_on_another_host_is_reached_over_tcp_only(pool):
    elsewhere = msgspec.structs.replace(pool.ticket, host_id="another host")
    with closing(Receiver(), Receiver(transport="shm")) as (receiver, local):
        receiver.fetcher.attach(pool.address, elsewhere)
        assert receiver.fetch(pool.address, [1], [1]).transport == "tcp"
        local.fetcher.attach(pool.address, elsewhere)
        result = local.fetch(pool.address, [1], [1])
        assert not result.ok
        assert "cannot be reached by shm" in result.error


def test_a_peer_without_its_unix_socket_is_served_over_tcp_and_shared_memory_tried_again(pool):
    broken = msgspec.structs.replace(pool.ticket, shm_socket="nobody listens here")
    with closing(Receiver()) as (receiver,):
        receiver.fetcher.attach(pool.address, broken)
        assert receiver.fetch(pool.address, [1], [1]).transport == "tcp"
        receiver.fetcher.attach(pool.address, pool.ticket)  # another ticket replaces the first
        assert receiver.fetch(pool.address, [1], [1]).transport == "shm"


def test_a_fetch_of_nothing_succeeds_and_one_from_a_stranger_fails(pool):
    with closing(Receiver()) as (receiver,):
        assert not receiver.fetch(pool.address, [], []).ok
        result = receiver.fetch(pool.address, [1], [1])
        assert not result.ok
        assert "replica-7, boot 7, is not attached" in result.error
        beyond = receiver.fetch(pool.address, [1], [100_000], grain_tokens=1)
        assert beyond.error is not None, "grains are numbered up to more than there are pages, which nobody can check"
        assert "is not attached" in beyond.error
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [], []).ok


@pytest.mark.parametrize("source", [[64], [-1], [0, 2**40], [2**70]])
def test_source_pages_that_the_peer_does_not_have_are_an_error(pool, transport, source):
    with closing(Receiver(transport=transport)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        result = receiver.fetch(pool.address, source, list(range(len(source))))
        assert not result.ok
        assert "not all in the peer's pool of 64 pages" in result.error


def test_more_pages_than_the_peer_has_are_an_error(pool, transport):
    with closing(Receiver(transport=transport, num_pages=100)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        result = receiver.fetch(pool.address, [1] * 65, list(range(65)))
        assert not result.ok
        assert "65 pages asked for" in result.error


@pytest.mark.parametrize(
    ("source", "target", "checksums", "message"),
    [
        ([1], [64], [], "not all in our pool of 64 pages"),
        ([1], [-1], [], "not all in our pool"),
        ([1, 2], [3], [], "2 source pages and 0 checksums for 1 target pages"),
        ([1, 2], [3, 4], [5], "1 checksums for 2 target pages"),
        ([1, 2], [3, 3], [], "1 of 2 target pages are named twice"),
    ],
)
def test_what_the_caller_gets_wrong_is_refused_at_once(pool, source, target, checksums, message):
    with closing(Receiver()) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        with pytest.raises(ValueError, match=message):
            receiver.start(pool.address, source, target, checksums=checksums)
        assert receiver.fetcher.num_jobs == 0


def test_a_key_is_one_fetch_at_a_time(pool):
    gate = Gate()
    with closing(Receiver(faults=gate)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.start(pool.address, [1], [1])
        with pytest.raises(ValueError, match="a fetch with key 'job' is running already"):
            receiver.start(pool.address, [2], [2])
        gate.open()
        assert receiver.wait().ok
        assert receiver.fetch(pool.address, [2], [2]).ok


def test_on_done_may_fetch_again_under_the_same_key_and_may_fail(pool, transport):
    with closing(Receiver(transport=transport)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)

        def again(result):
            receiver.start(pool.address, [2], [2], key=result.key)
            raise RuntimeError("a bug of the caller's")

        receiver.fetcher.fetch(FetchJob(key="job", peer=pool.address, source_pages=[1], target_pages=[1]), again)
        assert receiver.wait().ok
        assert receiver.fetch(pool.address, [3], [3]).ok


def test_interchangeable_pages_are_a_condition(pool):
    with closing(Receiver(page_bytes=2048)) as (receiver,):
        with pytest.raises(ValueError, match="run the same model, dtype and page size"):
            receiver.fetcher.attach(pool.address, pool.ticket)
        other = msgspec.structs.replace(pool.ticket, page_bytes=2048, layout="another model")
        with pytest.raises(ValueError, match="another model"):
            receiver.fetcher.attach(pool.address, other)


def test_tickets_that_lie_about_the_pool_are_found_out(pool, transport):
    larger = msgspec.structs.replace(pool.ticket, num_pages=65)
    with closing(Receiver(transport=transport)) as (receiver,):
        receiver.fetcher.attach(pool.address, larger)
        result = receiver.fetch(pool.address, [64], [1])
        assert not result.ok
        assert receiver.page(1) == bytes(4096)


def test_another_boot_is_another_peer(pool, transport):
    earlier = PeerAddress("replica-7", 6, "127.0.0.1", 1)
    with closing(Receiver(transport=transport)) as (receiver,):
        receiver.fetcher.attach(earlier, pool.ticket)  # this life's ticket under another life's name
        result = receiver.fetch(earlier, [1], [1])
        assert not result.ok
        assert "boot 7 now, boot 6 was meant" in result.error
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [1], [1]).ok


def test_short_fetches_go_before_long_ones_that_wait(pool):
    gate = Gate(keys={"first"})
    order = []
    with closing(Receiver(num_threads=1, transport="shm", faults=gate)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.start(pool.address, [0], [0], key="first")
        assert gate.reached.wait(30)
        original = receiver._done
        receiver._done = lambda result: (order.append(result.key), original(result))
        receiver.start(pool.address, list(range(50)), list(range(10, 60)), key="long")
        receiver.start(pool.address, [1], [1], key="short")
        gate.open()
        assert receiver.wait("long").ok
        assert order == ["short", "long"]


def test_nothing_is_left_behind(transport):
    threads, fds = set(threading.enumerate()), open_fds()
    pool = ServedPool(boot=3)
    receiver = Receiver(transport=transport)
    receiver.fetcher.attach(pool.address, pool.ticket)
    assert receiver.fetch(pool.address, [1, 5], [1, 2]).ok
    receiver.close()
    receiver.fetcher.close()  # again, which does nothing
    pool.close()
    pool.close()
    assert set(threading.enumerate()) == threads
    assert open_fds() == fds
    with pytest.raises(RuntimeError, match="closed"):
        receiver.start(pool.address, [1], [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_bytes": 0}, "pages of 0 bytes"),
        ({"page_bytes": 2**20}, "pages of 1048576 bytes in a memory of 4096"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"transport": "pigeon"}, "'pigeon' is not one of auto, shm, tcp"),
        ({"secret": b""}, "secret is empty"),
    ],
)
def test_a_fetcher_that_cannot_work_is_refused(options, message):
    settings = {"page_bytes": 4096, "layout": LAYOUT, "secret": b"x", **options}
    with SharedMemory(4096) as memory, pytest.raises(ValueError, match=message):
        PageFetcher(memory=memory, **settings)
