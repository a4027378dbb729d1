"""Pages through process groups: real gloo between helper processes of this process and of a peer's."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from peer_processes import PeerProcess
from transfer_pools import (
    SECRET,
    WAIT_S,
    Breaker,
    Bug,
    FakeClock,
    Gate,
    Receiver,
    ServedPool,
    closing,
    freeze,
    open_fds,
    until,
)

from protocol.handshake import RegionTicket
from protocol.rooms import PeerAddress
from transfer.checksum import page_checksums
from transfer.dist.door import GroupDoor
from transfer.faults import CopySite, Faults
from transfer.jobs import FetchJob, FetchResult
from transfer.memory import SharedMemory
from transfer.transport import TransferTimings
from transfer.wire import GREETING_BYTES, Want, decode_greeting, encode_hello

PAGE = 256 << 10
PAGES = 96
"""24 MB: twice what is under way at a time."""
GROUP_WAIT_S = 120.0
"""For a group to be made again, on the busiest machine."""
UNHURRIED = TransferTimings(handshake_s=1e6, patience_s=1e6)
"""On a clock that is turned by hand."""


class Switch:
    """Faults that a test lends to a receiver which others use too."""

    def __init__(self) -> None:
        self.faults: Faults | None = None

    def before_copy(self, site: CopySite) -> None:
        if self.faults is not None:
            self.faults.before_copy(site)

    def after_copy(self, site: CopySite, landed: memoryview) -> None:
        if self.faults is not None:
            self.faults.after_copy(site, landed)


class Pool:
    """A peer with a gloo door, and a receiver that is attached to it. While `held`, the peer makes no helpers."""

    def __init__(self, *, boot: int, held: bool = False, **timings_and_clock) -> None:
        options = {"timings": TransferTimings(patience_s=GROUP_WAIT_S), **timings_and_clock}
        self.peer = PeerProcess(boot=boot, page_bytes=PAGE, num_pages=PAGES, transport="gloo")
        if held:
            until(lambda: [name_of(pid) for pid in servers_of(self.peer.pid)] == ["kv-fork"], within_s=GROUP_WAIT_S)
            (self.held,) = servers_of(self.peer.pid)  # with that name it ends with the peer, stopped or not
            freeze(self.held)
        self.switch = Switch()
        self.receiver = Receiver(page_bytes=PAGE, num_pages=PAGES, transport="gloo", faults=self.switch, **options)
        self.receiver.fetcher.attach(self.peer.address, self.peer.ticket)
        self.sums = page_checksums(memoryview(self.peer.content).cast("B"), PAGE, range(PAGES))

    def start(self, source, target, **options):
        checksums = [self.sums[page] for page in source]
        self.receiver.start(self.peer.address, source, target, checksums=checksums, **options)

    def fetch(self, source, target, **options):
        self.start(source, target, **options)
        return self.receiver.wait(options.get("key", "job"), within_s=GROUP_WAIT_S)

    def go_round(self) -> None:
        """The fetcher's thread has done what it was asked to do so far."""
        stranger = PeerAddress("stranger", 99, "127.0.0.1", 1)
        assert not self.receiver.fetch(stranger, [1], [95], key="round").ok

    def clear(self) -> None:
        self.receiver.memory.view[:] = bytes(PAGE * PAGES)

    def close(self) -> None:
        self.receiver.close()
        self.peer.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Pool]:
    with closing(Pool(boot=1)) as (pool,):
        yield pool


@pytest.fixture
def pool(shared) -> Iterator[Pool]:
    shared.clear()
    yield shared
    shared.switch.faults = None


def servers_of(pid: int) -> list[int]:
    """The processes of `pid` that fork those that take part in groups."""
    return [child for child in children_of(pid) if b"fork_server" in Path(f"/proc/{child}/cmdline").read_bytes()]


def helpers_of(pid: int) -> list[int]:
    """The processes of `pid` that take part in groups."""
    return [helper for server in servers_of(pid) for helper in children_of(server)]


def children_of(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread has just ended
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


@contextlib.contextmanager
def expect_end(pids: list[int]) -> Iterator[None]:
    """These processes end within the block or soon after it."""
    assert pids
    watched = [os.pidfd_open(pid) for pid in pids]
    yield
    for fd in watched:
        assert select.select([fd], [], [], WAIT_S)[0], f"one of {pids} lives on"
        os.close(fd)


class Answers:
    """What a fetch of half the pool is answered, each time with whether process `helper` could write anywhere at that
    moment. Its first pieces are on their way when this has been made."""

    def __init__(self, pool: Pool, helper: int) -> None:
        self._pool = pool
        self._helper = helper
        self._given: list[tuple[str | None, bool]] = []
        self._changed = threading.Condition()
        pages = range(PAGES // 2)
        job = FetchJob(key="watched", peer=pool.peer.address, source_pages=pages, target_pages=pages)
        pool.receiver.fetcher.fetch(job, self._done)
        self._pool.go_round()

    def expect_none_after_cancel(self) -> None:
        self._pool.receiver.fetcher.cancel("watched")
        self._pool.go_round()
        assert self._given == []

    def wait(self) -> list[tuple[str | None, bool]]:
        with self._changed:
            assert self._changed.wait_for(lambda: self._given, WAIT_S)
            return self._given

    def _done(self, result: FetchResult) -> None:
        with self._changed:
            self._given.append((result.error, has_memory(self._helper)))
            self._changed.notify_all()


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def has_memory(pid: int) -> bool:
    """Not when it has ended, whether or not it was reaped since."""
    try:
        return Path(f"/proc/{pid}/maps").read_text() != ""
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (list(range(PAGES)), list(range(PAGES))),
        (list(range(10, 31)), list(range(21))),
        ([7, 3, 4, 5, 90, 1, 2], [50, 9, 10, 70, 71, 72, 8]),
        ([5, 5, 6], [1, 2, 3]),
    ],
    ids=["whole pool", "one span", "scattered", "a page twice"],
)
def test_pages_arrive_where_they_were_wanted_and_nowhere_else(pool, source, target):
    result = pool.fetch(source, target)
    assert (result.ok, result.transport, result.error) == (True, "gloo", None)
    for page in range(PAGES):
        expected = pool.peer.page(source[target.index(page)]) if page in target else bytes(PAGE)
        assert pool.receiver.page(page) == expected


def test_copies_run_side_by_side_and_the_short_one_ends_first(pool):
    pool.switch.faults = gate = Gate(keys={"long"})
    pool.start(list(range(90)), list(range(90)), key="long")
    assert gate.reached.wait(WAIT_S)
    pool.start([95], [91], key="short")
    gate.open()
    assert pool.receiver.wait("short").ok
    assert pool.receiver.wait("long").ok
    assert list(pool.receiver.results)[-2:] == ["short", "long"]
    assert pool.receiver.page(91) == pool.peer.page(95)
    assert pool.receiver.page(89) == pool.peer.page(89)


@pytest.mark.parametrize("faults", [Breaker(corrupting={"gloo"}), Bug(transports={"gloo"})], ids=["changed", "bug"])
def test_a_piece_that_is_not_verified_is_taken_over_tcp(pool, faults):
    pool.switch.faults = faults
    result = pool.fetch([1, 2], [1, 2])
    assert (result.ok, result.transport) == (True, "tcp")
    assert pool.receiver.page(2) == pool.peer.page(2)
    pool.switch.faults = None
    assert pool.fetch([3], [3]).transport == "gloo"  # nothing is held against the group


def test_wrong_checksums_fail_on_every_way(pool):
    result = pool.receiver.fetch(pool.peer.address, [1], [1], checksums=[1])
    assert not result.ok
    assert result.error.startswith("gloo: page 1 arrived with checksum")
    assert "; tcp: page 1 arrived with checksum" in result.error


def test_a_cancelled_copy_is_answered_and_nothing_comes_later(pool):
    pool.switch.faults = gate = Gate(keys={"held"})
    pool.receiver.start(pool.peer.address, list(range(80)), list(range(80)), key="held")
    assert gate.reached.wait(WAIT_S)
    pool.receiver.fetcher.cancel("held")
    gate.open()
    result = pool.receiver.wait("held")
    assert (result.cancelled, result.transport) == (True, "gloo")
    pool.clear()
    assert pool.fetch([80], [80]).transport == "gloo"
    assert bytes(pool.receiver.memory.view[: 80 * PAGE]) == bytes(80 * PAGE)


def test_a_cancelled_copy_is_answered_when_what_is_on_its_way_has_landed():
    others = helpers_of(os.getpid())
    with closing(Pool(boot=12, clock=FakeClock(), timings=UNHURRIED)) as (pool,):
        assert pool.fetch([1], [1]).transport == "gloo"
        (taker,) = (pid for pid in helpers_of(os.getpid()) if pid not in others)
        freeze(taker)
        answers = Answers(pool, taker)
        answers.expect_none_after_cancel()
        os.kill(taker, signal.SIGCONT)
        (answer,) = answers.wait()
        assert answer == ("it was cancelled; gloo: stopped", True)
        pool.clear()
        assert pool.fetch([90], [95]).transport == "gloo"
        assert bytes(pool.receiver.memory.view[: 95 * PAGE]) == bytes(95 * PAGE)  # nothing came later


@pytest.mark.parametrize("how", ["in time", "detached"])
def test_a_cancelled_copy_is_not_answered_before_the_end_of_a_helper_that_hangs(how):
    clock, others = FakeClock(), helpers_of(os.getpid())
    with closing(Pool(boot=13, clock=clock, timings=UNHURRIED)) as (pool,):
        assert pool.fetch([1], [1]).transport == "gloo"
        (taker,) = (pid for pid in helpers_of(os.getpid()) if pid not in others)
        freeze(taker)
        answers = Answers(pool, taker)
        answers.expect_none_after_cancel()
        if how == "detached":
            pool.receiver.fetcher.detach(pool.peer.address)
        else:
            clock.advance(2)
        (answer,) = answers.wait()
        assert answer == ("it was cancelled; gloo: stopped", False)


def test_a_pool_that_helpers_may_not_write_to_is_refused():
    with SharedMemory(PAGE) as memory, pytest.raises(ValueError, match="SharedMemory with shared_writable=True"):
        Receiver(page_bytes=PAGE, transport="gloo", memory=memory)


def test_a_killed_peer_fails_its_copies_and_its_next_life_is_another_peer():
    others = helpers_of(os.getpid())
    with closing(Pool(boot=2)) as (pool,):
        assert pool.fetch([1], [1]).transport == "gloo"
        pool.switch.faults = gate = Gate()
        pool.receiver.start(pool.peer.address, list(range(PAGES)), list(range(PAGES)))
        assert gate.reached.wait(WAIT_S)
        ours = [pid for pid in helpers_of(os.getpid()) if pid not in others]
        with expect_end(ours + helpers_of(pool.peer.pid)):
            pool.peer.kill()
            gate.open()
            result = pool.receiver.wait()
            assert not result.ok
            assert result.error.startswith("gloo: no process group with the peer")
            assert "tcp: no connection to the peer" in result.error
            pool.receiver.fetcher.detach(pool.peer.address)
        with closing(PeerProcess(boot=3, page_bytes=PAGE, num_pages=PAGES, transport="gloo")) as (peer,):
            pool.receiver.fetcher.attach(peer.address, peer.ticket)
            result = pool.receiver.fetch(peer.address, [4], [5], within_s=GROUP_WAIT_S)
            assert (result.ok, result.transport) == (True, "gloo")
            assert pool.receiver.page(5) == peer.page(4)


def test_a_killed_helper_costs_one_attempt_and_is_replaced():
    others = helpers_of(os.getpid())
    timings = TransferTimings(retry_s=0.05, join_s=GROUP_WAIT_S, patience_s=GROUP_WAIT_S)
    with closing(Pool(boot=4, timings=timings)) as (pool,):
        assert pool.fetch([1], [1]).transport == "gloo"
        for side in ("giver", "taker"):
            until(lambda: pool.fetch([2], [2]).transport == "gloo", within_s=GROUP_WAIT_S)
            (giver,) = helpers_of(pool.peer.pid)
            (taker,) = (pid for pid in helpers_of(os.getpid()) if pid not in others)
            pool.clear()
            pool.switch.faults = gate = Gate(transport="gloo")
            pool.receiver.start(pool.peer.address, list(range(PAGES)), list(range(PAGES)))
            assert gate.reached.wait(WAIT_S)
            with expect_end([giver, taker]):
                os.kill(giver if side == "giver" else taker, signal.SIGKILL)
                gate.open()
                result = pool.receiver.wait()
                assert (result.ok, result.transport) == (True, "tcp")
            assert bytes(pool.receiver.memory.view) == pool.peer.content.tobytes()


def test_a_killed_fork_server_takes_its_helpers_along_and_is_replaced():
    others = servers_of(os.getpid())
    timings = TransferTimings(retry_s=0.05, join_s=GROUP_WAIT_S, patience_s=GROUP_WAIT_S, piece_s=GROUP_WAIT_S)
    with closing(Pool(boot=14, timings=timings)) as (pool,):
        for side in ("giver's", "taker's"):
            until(lambda: pool.fetch([2], [2]).transport == "gloo", within_s=GROUP_WAIT_S)
            (ours,) = (pid for pid in servers_of(os.getpid()) if pid not in others)
            (theirs,) = servers_of(pool.peer.pid)
            pool.clear()
            pool.switch.faults = gate = Gate(transport="gloo")
            pool.receiver.start(pool.peer.address, list(range(PAGES)), list(range(PAGES)))
            assert gate.reached.wait(WAIT_S)
            with expect_end(children_of(ours) + children_of(theirs)):
                os.kill(theirs if side == "giver's" else ours, signal.SIGKILL)
                gate.open()
                result = pool.receiver.wait()
                assert (result.ok, result.transport) == (True, "tcp")
            assert bytes(pool.receiver.memory.view) == pool.peer.content.tobytes()


def test_a_stopped_sender_is_given_up_and_does_not_outlive_its_replica():
    clock = FakeClock()
    with closing(Pool(boot=5, clock=clock, timings=UNHURRIED)) as (pool,):
        assert pool.fetch([1], [1]).transport == "gloo"
        (giver,) = helpers_of(pool.peer.pid)
        with expect_end([giver]):
            freeze(giver)
            pool.receiver.start(pool.peer.address, [2], [2], key="hurried", deadline=clock() + 5)
            clock.advance(6)
            pool.receiver.start(pool.peer.address, [3], [3], key="patient")
            result = pool.receiver.wait_turning(clock, seconds=0.3, key="hurried")
            assert result.error == "its deadline passed; gloo: stopped"
            result = pool.receiver.wait("patient")  # the group had to end for the other
            assert (result.ok, result.transport) == (True, "tcp")
            assert pool.receiver.page(2) == bytes(PAGE)
            pool.peer.kill()


def test_a_killed_receiver_takes_its_helper_along_and_frees_the_senders():
    others = helpers_of(os.getpid())
    with closing(ServedPool(boot=10, transport="gloo")) as (pool,):
        command = [sys.executable, "-c", _TAKE_ONE, msgspec.json.encode(pool.ticket).decode()]
        path = f"{Path(__file__).parent}:{Path(__file__).parents[2]}"
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        ) as receiver:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == b"gloo\n"
            (taker,) = helpers_of(receiver.pid)
            (giver,) = (pid for pid in helpers_of(os.getpid()) if pid not in others)
            with expect_end([taker, giver]):
                receiver.kill()


_TAKE_ONE = """
import sys
import msgspec
from transfer_pools import PeerAddress, Receiver, TransferTimings
from protocol.handshake import RegionTicket
receiver = Receiver(transport="gloo", timings=TransferTimings(patience_s=120))
peer = PeerAddress("replica-10", 10, "127.0.0.1", 1)
receiver.fetcher.attach(peer, msgspec.json.decode(sys.argv[1], type=RegionTicket))
print(receiver.fetch(peer, [1], [1], within_s=120).transport, flush=True)
sys.stdin.read()
"""


def test_a_copy_does_not_wait_for_a_group_that_is_long_in_coming():
    clock = FakeClock()
    timings = TransferTimings(handshake_s=1e6, join_s=1e6)
    with closing(Pool(boot=11, held=True, clock=clock, timings=timings)) as (pool,):
        pool.receiver.start(pool.peer.address, [1], [1])
        pool.go_round()
        clock.advance(6)
        result = pool.receiver.wait()
        assert (result.ok, result.transport) == (True, "tcp")
        os.kill(pool.held, signal.SIGCONT)
        until(lambda: pool.fetch([2], [2]).transport == "gloo", within_s=GROUP_WAIT_S)  # the group was not given up


def test_close_leaves_nothing_behind():
    fds, others = open_fds(), servers_of(os.getpid())
    pool = Pool(boot=6)
    assert pool.fetch([1], [1]).transport == "gloo"
    ours = [pid for pid in servers_of(os.getpid()) if pid not in others]
    with expect_end([*ours, *children_of(ours[0]), *helpers_of(pool.peer.pid)]):
        pool.receiver.close()
        assert servers_of(os.getpid()) == others
    pool.peer.close()
    assert open_fds() == fds


def test_a_receiver_that_closes_while_its_group_is_being_made():
    others = helpers_of(os.getpid())
    with closing(Pool(boot=7, held=True)) as (pool,):
        pool.receiver.start(pool.peer.address, [1], [1])
        until(lambda: helpers_of(os.getpid()) != others, within_s=GROUP_WAIT_S)
        pool.receiver.fetcher.close()
        assert pool.receiver.wait().error == "the fetcher was closed; gloo: stopped"
        assert helpers_of(os.getpid()) == others


@pytest.mark.parametrize("address", ["", "nonsense", "somewhere:80", "127.0.0.1:0", "127.0.0.1:65536", "1.2.3.4:٣"])
def test_a_door_whose_address_makes_no_sense_is_not_tried(address):
    with closing(ServedPool(boot=8), Receiver(transport="gloo")) as (pool, receiver):
        receiver.fetcher.attach(pool.address, _with_door(pool.ticket, address))
        assert receiver.fetch(pool.address, [1], [1]).transport == "tcp"


def test_a_door_that_is_not_there_is_reported_and_another_way_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with closing(ServedPool(boot=8), Receiver(transport="gloo")) as (pool, receiver):
        receiver.fetcher.attach(pool.address, _with_door(pool.ticket, f"127.0.0.1:{port}"))
        result = receiver.fetch(pool.address, [1], [1], checksums=[1])
        assert "gloo: no process group with the peer: cannot connect: Connection refused" in result.error


@pytest.mark.parametrize("how", ["silence", "garbage", "another secret", "another purpose"])
def test_no_helper_is_started_for_those_who_do_not_know_the_secret(how):
    clock, others = FakeClock(), helpers_of(os.getpid())
    with SharedMemory(PAGE) as memory, contextlib.ExitStack() as stack:
        door = GroupDoor(
            "gloo", memory=memory, page_bytes=PAGE, num_pages=1, host="127.0.0.1", boot=9, secret=SECRET, clock=clock
        )
        stack.callback(door.close, timeout_s=WAIT_S)
        host, _, port = door.address().rpartition(":")
        sock = stack.enter_context(socket.create_connection((host, int(port)), timeout=WAIT_S))
        nonce = decode_greeting(sock.recv(GREETING_BYTES, socket.MSG_WAITALL))
        if how == "silence":
            clock.advance(60)
        elif how == "garbage":
            sock.sendall(bytes(4096))
        else:
            want = Want.PAGES if how == "another purpose" else Want.GROUP
            secret = b"another" if how == "another secret" else SECRET
            sock.sendall(encode_hello(secret, nonce, want=want, boot=9, nonce=bytes(16)))
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        assert helpers_of(os.getpid()) == others


def _with_door(ticket: RegionTicket, address: str) -> RegionTicket:
    return msgspec.structs.replace(ticket, doors={"gloo": address})
