"""A mooncake door whose process was killed comes back, at another address that peers are told."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
from collections.abc import Iterator

import msgspec
import pytest
from mooncake_library import needs_library
from transfer_pools import WAIT_S, FakeClock, Gate, Receiver, ServedPool, closing, open_fds

from protocol.handshake import RegionTicket
from transfer.memory import SharedMemory
from transfer.mooncake.door import MooncakeDoor
from transfer.transport import TransferTimings

pytestmark = needs_library

AT_ONCE = TransferTimings(retry_s=0.0)


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with SharedMemory(64 << 10) as memory:
        yield memory


@contextlib.contextmanager
def opened(memory: SharedMemory, **options) -> Iterator[tuple[MooncakeDoor, threading.Semaphore]]:
    """A door, and how often it has moved."""
    moved = threading.Semaphore(0)
    door = MooncakeDoor(memory=memory, host="127.0.0.1", on_moved=moved.release, **options)
    try:
        yield door, moved
    finally:
        door.close(timeout_s=WAIT_S)


@pytest.fixture
def warnings() -> Iterator[queue.SimpleQueue[str]]:
    """What the door warns of, as it does."""
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.put(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transfer.mooncake.door")
    logger.addHandler(handler)
    yield heard
    logger.removeHandler(handler)


def ticket_of(pool: ServedPool, door: MooncakeDoor) -> RegionTicket:
    return msgspec.structs.replace(pool.ticket, doors={"mooncake": door.address()})


def test_pages_come_through_the_new_process_and_copies_under_way_are_left_alone():
    gate = Gate(keys={"held"})
    with (
        closing(ServedPool(boot=31), Receiver(transport="mooncake", faults=gate)) as (pool, receiver),
        opened(pool.memory, timings=AT_ONCE) as (door, moved),
    ):
        before = door.address()
        receiver.fetcher.attach(pool.address, ticket_of(pool, door))
        receiver.start(pool.address, [2], [2], key="held")
        assert gate.reached.wait(WAIT_S)
        os.kill(door.pid, signal.SIGKILL)
        assert receiver.fetch(pool.address, [1], [1]).transport == "tcp"
        assert moved.acquire(timeout=WAIT_S)
        assert door.address() != before
        receiver.fetcher.attach(pool.address, ticket_of(pool, door))
        sums = pool.checksums([3])
        assert receiver.fetch(pool.address, [3], [3], checksums=sums).transport == "mooncake"
        gate.open()
        assert (receiver.wait("held").ok, receiver.wait("held").transport) == (True, "mooncake")
        assert [receiver.page(page) for page in (1, 2, 3)] == [pool.page(page) for page in (1, 2, 3)]


def test_a_door_that_keeps_dying_is_opened_less_and_less_often(memory, warnings):
    clock = FakeClock()
    with opened(memory, clock=clock) as (door, moved):
        for alive_s, pause in ((0, 2), (59, 4), (60, 2)):
            clock.advance(alive_s)
            os.kill(door.pid, signal.SIGKILL)
            assert f"its process ended: signal 9); peers take our TCP; next attempt in {pause} s" in warnings.get(
                timeout=WAIT_S
            )
            clock.advance(pause)
            assert moved.acquire(timeout=WAIT_S)


def test_a_library_that_cannot_start_again_is_tried_until_it_can(memory, warnings, tmp_path, monkeypatch):
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").write_text("raise ImportError('gone')\n")
    clock = FakeClock()
    with opened(memory, clock=clock) as (door, moved):
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(tmp_path))
            os.kill(door.pid, signal.SIGKILL)
            assert "next attempt in 2 s" in warnings.get(timeout=WAIT_S)
            clock.advance(2)
            assert "cannot be imported (gone)" in warnings.get(timeout=WAIT_S)
        clock.advance(4)
        assert moved.acquire(timeout=WAIT_S)


@pytest.mark.parametrize("retry_s", [0.0, 1000.0], ids=["while it opens", "while it is shut"])
def test_closed_without_a_process_that_serves_it_leaves_nothing_behind(memory, warnings, retry_s):
    threads, fds = set(threading.enumerate()), open_fds()
    with opened(memory, timings=TransferTimings(retry_s=retry_s)) as (door, _):
        os.kill(door.pid, signal.SIGKILL)
        warnings.get(timeout=WAIT_S)
    assert set(threading.enumerate()) == threads
    assert open_fds() == fds
    with pytest.raises(ProcessLookupError):
        os.kill(door.pid, 0)
