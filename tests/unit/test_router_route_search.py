"""The search for a sequence's next replicas, on a clock turned by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from protocol.membership import Member, ReplicaRole
from protocol.rooms import FailureCode, PeerAddress
from router.failover import Failover
from router.pairing import Route, RouteRequest
from router.replica_view import ReplicaView
from router.route_search import RouteSearch

REQUEST = RouteRequest(num_tokens=8, chain=[])


class World:
    """Replicas that are up or not, one sequence's search for them, and timers that go off when time passes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now = 100.0
        self.said: list[str] = []
        self.patience: list[bool] = []
        address = PeerAddress("d", 1, "host", 1)
        member = Member(address=address, role=ReplicaRole.DECODE, page_size=16, max_total_tokens=4096)
        self.replica = ReplicaView(member)
        self.is_up = True
        self.failover = Failover()
        self.search = RouteSearch(
            choose=self.choose,
            failover=self.failover,
            clock=lambda: self.now,
            call_later=self.call_later,
            wait_s=5.0,
        )
        self._loop = loop
        self._timers: list[tuple[asyncio.TimerHandle, Callable[[], None]]] = []

    def choose(self, request: RouteRequest, *, patient: bool) -> Route | None:
        assert request is REQUEST
        self.patience.append(patient)
        return Route(None, self.replica) if self.is_up else None

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(self.now + delay_s, callback, (), self._loop)
        self._timers.append((handle, callback))
        return handle

    def begin(self, *, deadline: float = 200.0) -> None:
        self.search.begin(
            REQUEST,
            deadline=deadline,
            pause_s=0.5,
            found=lambda route: self.said.append("found"),
            gave_up=lambda: self.said.append("gave up"),
        )

    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self._timers if timer[0].when() <= self.now]
        self._timers = [timer for timer in self._timers if timer not in due]
        for handle, callback in due:
            if not handle.cancelled():
                callback()


@pytest.fixture
def world() -> Iterator[World]:
    loop = asyncio.new_event_loop()
    yield World(loop)
    loop.close()


def test_what_is_up_is_found_at_once_and_once(world: World) -> None:
    world.begin()
    world.search.replica_up()
    world.wait(50.0)
    assert world.said == ["found"]


def test_a_replica_that_comes_up_in_time_is_found(world: World) -> None:
    world.is_up = False
    world.begin()
    world.wait(4.0)
    world.is_up = True
    world.search.replica_up()
    world.wait(50.0)
    assert world.said == ["found"]


def test_it_gives_up_when_none_comes_up_however_often_it_looked(world: World) -> None:
    world.is_up = False
    world.begin()
    world.wait(3.0)
    world.search.replica_up()  # another, which is of no use
    world.wait(1.9)
    assert world.said == []
    world.wait(0.2)
    assert world.said == ["gave up"]
    assert world.patience == [True, True, False], "at the end whatever there is would do"


def test_it_gives_up_at_once_after_the_deadline(world: World) -> None:
    world.begin(deadline=world.now)
    assert world.said == ["gave up"]


def test_a_replica_that_failed_the_sequence_is_tried_again_after_a_pause(world: World) -> None:
    world.failover.half_failed(FailureCode.INTERNAL, world.replica, None)
    world.begin()
    world.wait(0.4)
    assert world.said == []
    world.wait(0.2)
    assert world.said == ["found"]


@pytest.mark.parametrize("is_up", [True, False])
def test_nothing_comes_of_a_search_that_was_ended(world: World, is_up: bool) -> None:
    world.failover.link_lost(world.replica)
    world.is_up = is_up
    world.begin()
    world.search.end()
    world.is_up = True
    world.search.replica_up()
    world.wait(50.0)
    assert world.said == []


def test_each_search_has_a_pause_of_its_own(world: World) -> None:
    world.failover.link_lost(world.replica)
    world.begin()
    world.wait(0.5)
    world.begin()
    assert world.said == ["found"]
    world.wait(0.5)
    assert world.said == ["found", "found"]
