"""Random schedules over every real transport, the peers in real processes that are killed, stopped and replaced between
any two steps.

At the end of each schedule every peer is whole again and must be able to give its pages: nothing is held against one
for ever. The fetcher's clock is turned by hand; the machine's own only bounds the wait of a test that fails.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from mooncake_library import needs_library
from process_world import Fleet, ProcessWorld
from transfer_pools import WAIT_S, closing, open_fds
from transfer_schedules import run_schedules, unharmed
from transfer_world import LawBroken, World

from transfer.choice import TransportName
from transfer.fetcher import FetchJob, PageFetcher
from transfer.jobs import FetchResult, OnDone
from transfer.transport import TransferTimings

GROUP_S = 120.0
"""For process groups to be made, on the busiest machine."""


def _signal_children(pid: int, number: signal.Signals, *, but: int = 0) -> bool:
    """Whether there were any."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += map(int, (task / "children").read_text().split())
    for child in found:
        if child != but:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
    return bool(found)


@contextlib.contextmanager
def fleet_of(transport: TransportName, folder: Path, caplog) -> Iterator[Fleet]:
    """Also checks that nothing is left behind."""
    fds = open_fds()
    with closing(Fleet(transport, folder)) as (fleet,), unharmed(caplog):
        yield fleet
    assert open_fds() == fds


@pytest.mark.parametrize("transport", ["shm", "tcp", "disk"])
@pytest.mark.filterwarnings("error")  # also of a thread that died
def test_peers_die_stop_and_come_again(transport, tmp_path, caplog):
    def make(choose: random.Random) -> World:
        fleet.restore()
        return ProcessWorld(fleet, num_threads=choose.randint(1, 3))

    with fleet_of(transport, tmp_path, caplog) as fleet:
        run_schedules(make, 24)


def bears_grudges(fetcher: PageFetcher) -> None:
    """Has nothing more to do with a peer that has failed it once."""
    fetch, failed = fetcher.fetch, set()

    def begin(job: FetchJob, on_done: OnDone) -> None:
        def note(result: FetchResult) -> None:
            if not result.ok:
                failed.add(job.peer)
            on_done(result)

        fetch(dataclasses.replace(job, deadline=0.0) if job.peer in failed else job, note)

    fetcher.fetch = begin


def test_a_grudge_is_found(tmp_path, caplog):
    def make(choose: random.Random) -> World:
        fleet.restore()
        return ProcessWorld(fleet, break_law=bears_grudges)

    with fleet_of("tcp", tmp_path, caplog) as fleet, pytest.raises(LawBroken, match=r"healthy peer .* gives nothing"):
        run_schedules(make, 40)


class HelpedWorld(ProcessWorld):
    """Of a transport with helper processes, which can be killed too. It is one world for many schedules, because those
    processes take long to start."""

    weights: ClassVar = {**ProcessWorld.weights, "strike_peer": 1, "strike_us": 1}

    def __init__(self, fleet, **options):
        self.doorless: set[int] = set()
        """Slots of peers whose mooncake has died: it is not started again, they serve by TCP for the rest of their
        lives."""
        super().__init__(fleet, **options)

    def strike_peer(self, slot):
        """Kill the helpers of a peer."""
        self.meet()
        peer = self.peers[slot]
        if peer.is_alive and _signal_children(peer.pid, signal.SIGKILL) and self.fleet.transport == "mooncake":
            self.doorless.add(slot)

    def strike_us(self, slot):
        """Kill all that help us."""
        self.meet()
        self.signal_ours(signal.SIGKILL)

    def signal_ours(self, number: signal.Signals) -> None:
        _signal_children(os.getpid(), number, but=self.fleet.nursery.pid)

    def wait_for_helpers(self) -> None:
        """Until every peer's pages come by the transport itself again, whatever happened before."""
        self.recover()
        while self.doorless:
            self.restart(self.doorless.pop())
        deadline = time.monotonic() + GROUP_S
        for slot in self.peers:
            while self.demand(slot) != self.fleet.transport:
                if time.monotonic() > deadline:
                    raise LawBroken(f"the peer in slot {slot} is never reached by {self.fleet.transport} again")
                self.time(1)
                time.sleep(0.02)  # the helpers need the processor too


class GroupWorld(HelpedWorld):
    """Its helpers write into our pages, and can be frozen with pieces on their way, to go on some time later."""

    weights: ClassVar = {**HelpedWorld.weights, "freeze": 2, "thaw": 2}

    def freeze(self, slot):
        self.signal_ours(signal.SIGSTOP)

    def thaw(self, slot):
        self.signal_ours(signal.SIGCONT)

    def recover(self):
        self.thaw(0)
        super().recover()


WORLDS = {"mooncake": HelpedWorld, "gloo": GroupWorld}


@pytest.mark.parametrize("transport", [pytest.param("mooncake", marks=needs_library), "gloo"])
@pytest.mark.filterwarnings("error")
def test_peers_and_helpers_die_stop_and_come_again(transport, tmp_path, caplog):
    numbers = itertools.count()

    def make(choose: random.Random) -> World:
        if next(numbers) % 8 == 0:
            world.wait_for_helpers()
        return world

    timings = TransferTimings(handshake_s=1e6, join_s=1e6, piece_s=100.0)
    with fleet_of(transport, tmp_path, caplog) as fleet:
        world = WORLDS[transport](fleet, timings=timings)
        run_schedules(make, 8, keep=True)
        world.wait_for_helpers()
        world.close()
        assert world.right[transport] >= 6
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def gives_pages_back_early(fetcher: PageFetcher) -> None:
    """Answers what has ended without waiting for what a helper may still write."""
    group = fetcher._transports[0]
    end = group._end

    def end_early(entry, copy, error):
        if not entry.copies[copy].ended:
            copy.on_ended(copy, error)
            copy.on_ended = lambda copy, error: None
        end(entry, copy, error)

    group._end = end_early


def test_a_page_given_back_while_a_helper_may_write_into_it_is_found(tmp_path, caplog):
    def cancel_what_is_on_its_way(*, answered_early: bool) -> None:
        world.wait_for_helpers()
        world.freeze(1)
        world.hold()
        world.fetch(1, 12, False, None)
        assert world.whims.held.wait(WAIT_S)
        world.cancel(0)
        world.go()
        if answered_early:
            world.settle(world.fetches - 1)
        world.thaw(1)
        world.rest()
        world.check()

    with fleet_of("gloo", tmp_path, caplog) as fleet:
        unhurried = TransferTimings(handshake_s=1e6, join_s=1e6, piece_s=1e6, drain_s=1e6)
        world = GroupWorld(fleet, timings=unhurried)
        cancel_what_is_on_its_way(answered_early=False)
        gives_pages_back_early(world.fetcher)
        with pytest.raises(LawBroken, match="was written to while nobody's"):
            cancel_what_is_on_its_way(answered_early=True)
        with contextlib.suppress(LawBroken):
            world.close()
        world.memory.close()
