"""Pages over the library's own TCP, its processes on both ends real: the right bytes in the right places, and never a
byte in a page that is the caller's again."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading

import msgspec
import pytest
from mooncake_library import needs_library
from peer_processes import PeerProcess
from transfer_pools import WAIT_S, Breaker, Gate, Receiver, ServedPool, closing, open_fds

from transfer.mooncake.messages import DoorAddress
from transfer.mooncake.transport import MooncakeTransport
from transfer.transport import TransferTimings

pytestmark = needs_library

AT_ONCE = TransferTimings(retry_s=0.0)
BLOCK_PAGES = 255
"""Of 4096 bytes: what the transport reads at once."""
LONG = list(range(8 * BLOCK_PAGES))
"""More blocks than are under way at a time: the last ones are read after what happens at a gate."""


@pytest.fixture(scope="module")
def pool():
    """Never harmed by a test."""
    with closing(ServedPool(boot=7, num_pages=2048, transport="mooncake")) as (pool,):
        yield pool


@contextlib.contextmanager
def receiver_of(pool, **options):
    """A receiver that `pool` is attached to."""
    options = {"num_pages": 2048, "transport": "mooncake", **options}
    with closing(Receiver(**options)) as (receiver,):
        receiver.fetcher.attach(pool.address, pool.ticket)
        yield receiver


def library_of(receiver) -> MooncakeTransport:
    transport = receiver.fetcher._transports[0]
    assert isinstance(transport, MooncakeTransport)
    return transport


def door_pid(pool: ServedPool | PeerProcess) -> int:
    """Of the process that serves `pool`."""
    if isinstance(pool, ServedPool):
        return pool.doors[0].pid
    with open(f"/proc/{pool.pid}/task/{pool.pid}/children", encoding="ascii") as children:
        return int(children.read())


def address_of(pool) -> DoorAddress:
    return msgspec.json.decode(pool.ticket.doors["mooncake"], type=DoorAddress)


@pytest.fixture
def any_runs(monkeypatch):
    """No run of pages is too short."""
    monkeypatch.setattr("transfer.mooncake.transport._SHORT_RUN_BYTES", 0)


@pytest.mark.usefixtures("any_runs")
def test_pages_arrive_in_their_places_and_nowhere_else(pool):
    source, target = [3, 4, 5, 40, 9, 8, 2047], [10, 11, 12, 0, 50, 51, 33]
    with receiver_of(pool) as receiver:
        result = receiver.fetch(pool.address, source, target, checksums=pool.checksums(source))
        assert result.ok, result.error
        assert (result.transport, result.bytes) == ("mooncake", len(source) * 4096)
        for page in range(2048):
            expected = pool.page(source[target.index(page)]) if page in target else bytes(4096)
            assert receiver.page(page) == expected


@pytest.mark.usefixtures("any_runs")
def test_long_fetches_arrive_whole_contiguous_scattered_and_many_at_once(pool):
    scattered = [page * 1031 % 2048 for page in range(2048)]
    with receiver_of(pool) as receiver:
        for source, target in ((LONG, LONG), (scattered, scattered[7:] + scattered[:7])):
            result = receiver.fetch(pool.address, source, target, checksums=pool.checksums(source))
            assert (result.ok, result.transport) == (True, "mooncake"), result.error
            assert all(receiver.page(to) == pool.page(page) for page, to in zip(source, target, strict=True))
        for key in range(32):
            pages = list(range(key * 64, key * 64 + 64))
            receiver.start(pool.address, pages[::-1], pages, key=key, checksums=pool.checksums(pages[::-1]))
        assert all((receiver.wait(key).ok, receiver.wait(key).transport) == (True, "mooncake") for key in range(32))
        assert receiver.page(65) == pool.page(126)


def test_only_copies_of_many_short_runs_go_another_way(pool):
    with receiver_of(pool) as receiver:
        runs = {"one": [7, 8, 9], "two long": [*range(70), *range(100, 170)], "two short": [1, 2, 5, 6]}
        ways = {name: receiver.fetch(pool.address, pages, pages, key=name) for name, pages in runs.items()}
        assert all(way.ok for way in ways.values())
        assert {name: way.transport for name, way in ways.items()} == {
            "one": "mooncake",
            "two long": "mooncake",
            "two short": "tcp",
        }
        assert receiver.page(6) == pool.page(6)


@pytest.mark.usefixtures("any_runs")
@pytest.mark.parametrize("page_bytes", [1, 1000, 3 << 20])
def test_any_page_size_works(page_bytes):
    pool = ServedPool(boot=2, page_bytes=page_bytes, num_pages=9, transport="mooncake")
    with closing(pool), receiver_of(pool, page_bytes=page_bytes, num_pages=9) as receiver:
        source, target = [0, 1, 2, 8, 5], [4, 5, 6, 7, 0]
        result = receiver.fetch(pool.address, source, target, checksums=pool.checksums(source))
        assert (result.ok, result.transport) == (True, "mooncake"), result.error
        assert [receiver.page(page) for page in target] == [pool.page(page) for page in source]


def test_a_wrong_checksum_fails_the_fetch(pool):
    with receiver_of(pool) as receiver:
        sums = pool.checksums([1, 2, 3])
        result = receiver.fetch(pool.address, [1, 2, 3], [1, 2, 3], checksums=[sums[0], sums[1] ^ 1, sums[2]])
        assert not result.ok
        assert "mooncake: page 2 arrived with checksum" in result.error
        assert receiver.fetch(pool.address, [1], [1], checksums=sums[:1]).transport == "mooncake"


def test_bytes_changed_on_the_way_are_noticed_and_fetched_again_over_tcp(pool):
    with receiver_of(pool, faults=Breaker(corrupting={"mooncake"})) as receiver:
        result = receiver.fetch(pool.address, [5], [6], checksums=pool.checksums([5]))
        assert (result.ok, result.transport) == (True, "tcp")
        assert receiver.page(6) == pool.page(5)


def test_a_cancelled_fetch_ends_between_blocks_and_writes_no_more(pool):
    gate = Gate(after_bytes=2 * BLOCK_PAGES * 4096)
    with receiver_of(pool, faults=gate) as receiver:
        receiver.start(pool.address, LONG, LONG)
        assert gate.reached.wait(WAIT_S)
        receiver.fetcher.cancel("job")
        gate.open()
        result = receiver.wait()
        assert result.cancelled
        landed = [receiver.page(page) == pool.page(page) for page in LONG]
        assert landed == [page < 3 * BLOCK_PAGES for page in LONG]  # the one at the gate was under way
        assert receiver.fetch(pool.address, [9], [1500]).transport == "mooncake"


def test_a_fetch_is_cancelled_while_the_peer_hangs_and_its_pages_are_ours_at_once():
    pool = PeerProcess(boot=11, num_pages=2048, transport="mooncake")
    with closing(pool), receiver_of(pool) as receiver:
        assert receiver.fetch(pool.address, [0], [2047]).transport == "mooncake"  # so that hands are shaken
        hang(door_pid(pool))
        receiver.start(pool.address, LONG, LONG)
        receiver.fetcher.cancel("job")
        assert receiver.wait().cancelled
        os.kill(door_pid(pool), signal.SIGCONT)  # now the late bytes come, but not into pages
        assert receiver.fetch(pool.address, LONG[5:], LONG[5:]).ok
        assert all(receiver.page(page) == bytes(4096) for page in LONG[:5])


def test_a_door_killed_in_the_middle_is_left_for_tcp():
    gate = Gate(transport="mooncake", after_bytes=BLOCK_PAGES * 4096)
    pool = PeerProcess(boot=12, num_pages=2048, transport="mooncake")
    with closing(pool), receiver_of(pool, faults=gate) as receiver:
        receiver.start(pool.address, LONG, LONG)
        assert gate.reached.wait(WAIT_S)
        os.kill(door_pid(pool), signal.SIGKILL)
        gate.open()
        result = receiver.wait()
        assert (result.ok, result.transport) == (True, "tcp")
        assert all(receiver.page(page) == pool.page(page) for page in LONG)
        assert receiver.fetch(pool.address, [3], [4]).transport == "tcp"


def test_a_dead_peer_fails_its_fetches_and_no_other_peers(pool):
    gate = Gate(transport="mooncake", keys={"dying"})
    dying = PeerProcess(boot=13, num_pages=2048, transport="mooncake")
    with closing(dying), receiver_of(dying, faults=gate) as receiver:
        receiver.fetcher.attach(pool.address, pool.ticket)
        receiver.start(dying.address, LONG, LONG, key="dying")
        assert gate.reached.wait(WAIT_S)
        dying.kill()
        gate.open()
        result = receiver.wait("dying")
        assert not result.ok
        assert "mooncake: " in result.error
        assert "tcp: " in result.error
        assert receiver.fetch(pool.address, [3], [4]).transport == "mooncake"
        assert receiver.page(4) == pool.page(3)


def test_a_library_that_dies_takes_nobody_along_and_is_replaced(pool):
    gate = Gate(transport="mooncake", after_bytes=BLOCK_PAGES * 4096)
    with receiver_of(pool, faults=gate, timings=AT_ONCE) as receiver:
        first = library_of(receiver).pid
        receiver.start(pool.address, LONG, LONG)
        assert gate.reached.wait(WAIT_S)
        os.kill(first, signal.SIGABRT)
        gate.open()
        assert (receiver.wait().ok, receiver.wait().transport) == (True, "tcp")
        assert all(receiver.page(page) == pool.page(page) for page in LONG)
        assert receiver.fetch(pool.address, LONG, LONG[::-1]).transport == "mooncake"
        assert all(receiver.page(LONG[-1 - page]) == pool.page(page) for page in LONG)
        assert library_of(receiver).pid != first
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)


def test_a_library_that_cannot_start_again_is_left_for_tcp_until_it_can(pool, tmp_path, monkeypatch):
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").write_text("raise ImportError('gone')\n")
    with receiver_of(pool, timings=AT_ONCE) as receiver:
        assert receiver.fetch(pool.address, [1], [1]).transport == "mooncake"
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(tmp_path))
            os.kill(library_of(receiver).pid, signal.SIGKILL)
            for page in range(2, 5):
                assert receiver.fetch(pool.address, [page], [page]).transport == "tcp"
        assert receiver.fetch(pool.address, [5], [5]).transport == "mooncake"
        assert [receiver.page(page) for page in range(1, 6)] == [pool.page(page) for page in range(1, 6)]


@pytest.mark.usefixtures("any_runs")
def test_a_read_that_fails_retires_the_process_that_ran_it(pool):
    """It may still be writing, so nothing of it is used again."""
    beyond = msgspec.structs.replace(pool.ticket, num_pages=4096)  # a ticket that lies about the pool
    with closing(Receiver(num_pages=2048, transport="mooncake", timings=AT_ONCE)) as (receiver,):
        receiver.fetcher.attach(pool.address, beyond)
        first = library_of(receiver).pid
        result = receiver.fetch(pool.address, [0, 4095], [1, 2])
        assert not result.ok
        assert "mooncake: the library reported a failed read" in result.error
        assert receiver.fetch(pool.address, [3], [4]).transport == "mooncake"
        assert library_of(receiver).pid != first
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)


def test_another_life_of_a_door_is_found_out(pool):
    stale = msgspec.json.encode(msgspec.structs.replace(address_of(pool), identity="00" * 32)).decode()
    ticket = msgspec.structs.replace(pool.ticket, doors={"mooncake": stale}, tcp_port=0)
    with closing(Receiver(num_pages=2048, transport="mooncake")) as (receiver,):
        receiver.fetcher.attach(pool.address, ticket)
        result = receiver.fetch(pool.address, [1], [1])
        assert not result.ok
        assert "another life of the peer's door answered" in result.error
        assert receiver.page(1) == bytes(4096)
        result = receiver.fetch(pool.address, [1], [1], checksums=pool.checksums([1]))
        assert (result.ok, result.transport) == (True, "mooncake"), "whose verified pages are does not matter"


@pytest.mark.parametrize("doors", [{}, {"mooncake": "nonsense"}, {"mooncake": '{"protocol": "rdma"}'}])
def test_peers_without_a_door_we_understand_are_reached_over_tcp(pool, doors):
    with closing(Receiver(num_pages=2048, transport="mooncake")) as (receiver,):
        receiver.fetcher.attach(pool.address, msgspec.structs.replace(pool.ticket, doors=doors))
        assert receiver.fetch(pool.address, [1], [1]).transport == "tcp"


def test_a_stranger_at_the_door_can_neither_change_a_page_nor_end_the_replica():
    pool = ServedPool(boot=14, transport="mooncake")
    with closing(pool), receiver_of(pool, num_pages=64) as receiver:
        address = address_of(pool)
        write = (
            "from mooncake.engine import TransferEngine; e = TransferEngine();"
            "assert e.initialize('127.0.0.1', 'P2PHANDSHAKE', 'tcp', '') == 0;"
            "p = e.allocate_managed_buffer(4096);"
            f"print(e.transfer_sync_read({address.session!r}, p, {address.base}, 4096),"
            f"e.transfer_sync_write({address.session!r}, p, {address.base + 4096}, 4096), flush=True);"
            "import os; os._exit(0)"
        )
        stranger = subprocess.run([sys.executable, "-c", write], capture_output=True, text=True, timeout=60)
        assert stranger.stdout.split() == ["0", "-1"]
        sums = pool.checksums([1])
        assert receiver.fetch(pool.address, [1], [1], checksums=sums).transport == "mooncake"
        host, port = address.session.split(":")
        with (
            open(os.pidfd_open(door_pid(pool)), "rb", buffering=0) as door,
            socket.create_connection((host, int(port)), timeout=WAIT_S) as connection,
        ):
            connection.sendall(struct.pack("<Q", 3) + b"\0[]")  # well-formed, and not what the library expects
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b""
            assert select.select([door], [], [], WAIT_S)[0], "the door's process does not end"
        assert receiver.fetch(pool.address, [1], [2], checksums=sums).transport == "tcp"


def test_a_detached_peer_ends_its_fetches(pool):
    gate = Gate(transport="mooncake")
    with receiver_of(pool, faults=gate) as receiver:
        receiver.start(pool.address, LONG, LONG)
        assert gate.reached.wait(WAIT_S)
        receiver.fetcher.detach(pool.address)
        gate.open()
        result = receiver.wait()
        assert not result.ok
        assert "its peer was detached" in result.error
        assert "not attached" in receiver.fetch(pool.address, [1], [1]).error
        receiver.fetcher.attach(pool.address, pool.ticket)
        assert receiver.fetch(pool.address, [1], [1]).transport == "mooncake"


def test_close_ends_what_runs_and_leaves_nothing_behind():
    threads, fds = set(threading.enumerate()), open_fds()
    pool, gate = ServedPool(boot=15, num_pages=2048, transport="mooncake"), Gate(transport="mooncake")
    receiver = Receiver(num_pages=2048, transport="mooncake", faults=gate)
    receiver.fetcher.attach(pool.address, pool.ticket)
    receiver.start(pool.address, LONG, LONG)
    assert gate.reached.wait(WAIT_S)
    processes = [door_pid(pool), library_of(receiver).pid]
    closer = threading.Thread(target=receiver.close)
    closer.start()
    gate.open()
    closer.join(WAIT_S)
    assert "the fetcher was closed" in receiver.wait().error
    pool.close()
    assert set(threading.enumerate()) == threads
    assert open_fds() == fds
    for pid in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_librarys_processes_end_with_their_parent():
    peer = PeerProcess(boot=16, transport="mooncake")
    with closing(peer), open(os.pidfd_open(door_pid(peer)), "rb", buffering=0) as door:
        peer.kill()
        assert select.select([door], [], [], WAIT_S)[0], "the door's process outlived its replica"


def test_a_pool_without_a_door_and_one_with_it_serve_the_same_fetcher(pool):
    plain = ServedPool(boot=17)
    with closing(plain), receiver_of(pool) as receiver:
        receiver.fetcher.attach(plain.address, plain.ticket)
        assert receiver.fetch(plain.address, [1], [1]).transport == "tcp"
        assert receiver.fetch(pool.address, [1], [2]).transport == "mooncake"


def hang(pid: int) -> None:
    """SIGSTOP somebody else's child, and wait until it has taken effect."""
    os.kill(pid, signal.SIGSTOP)
    for _ in range(100_000):
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            if stat.read().rsplit(")", 1)[1].split()[0] == "T":
                return
    raise AssertionError(f"process {pid} does not stop")
