"""The small bounded memories of the halves: deadlines, tombstones, parked messages, and what they add up to."""

from __future__ import annotations

import random

import pytest

from protocol.parking import Parking
from protocol.room_memory import Fate, MemoryLimits, RoomMemory
from protocol.rooms import AbortReason, Join, Reservation, Room
from protocol.timers import Timers
from protocol.tombstones import Tombstones

A0, A1, A2 = (Room("a", epoch) for epoch in range(3))
GONE = AbortReason.CLIENT_GONE


# ---- timers -----------------------------------------------------------------------------------------------------


def test_timers_come_in_order_and_only_when_due() -> None:
    timers: Timers[str] = Timers()
    for key, when in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        timers.set(key, when)
    assert timers.next() == 1.0
    assert list(timers.pop_due(2.0)) == ["a", "b"]
    assert timers.next() == 3.0
    assert list(timers.pop_due(2.9)) == []


def test_setting_again_replaces_and_cancelling_removes() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 1.0)
    timers.set("a", 5.0)
    assert timers.next() == 5.0
    timers.set("b", 4.0)
    timers.cancel("b")
    timers.cancel("unknown")
    assert (timers.next(), len(timers), "b" in timers) == (5.0, 1, False)


def test_what_is_done_for_one_due_timer_can_cancel_another() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 1.0)
    timers.set("b", 1.0)
    timers.set("c", 1.0)
    seen = []
    for key in timers.pop_due(1.0):
        seen.append(key)
        timers.cancel("b")
    assert seen == ["a", "c"]


def test_timers_agree_with_a_plain_dictionary_and_stay_small() -> None:
    choose = random.Random(7)
    timers: Timers[int] = Timers()
    plain: dict[int, float] = {}
    now = 0.0
    for _ in range(20_000):
        key, action = choose.randrange(20), choose.random()
        if action < 0.7:
            plain[key] = now + choose.random() * 10
            timers.set(key, plain[key])
        elif action < 0.9:
            plain.pop(key, None)
            timers.cancel(key)
        else:
            now += choose.random()
            due = sorted((when, key) for key, when in plain.items() if when <= now)
            assert sorted(timers.pop_due(now)) == sorted(key for _, key in due)
            plain = {key: when for key, when in plain.items() if when > now}
        assert timers.next() == min(plain.values(), default=None)
    assert len(timers._heap) < 200


# ---- tombstones ---------------------------------------------------------------------------------------------------


def test_the_newest_epoch_has_the_tombstone() -> None:
    stones = Tombstones(limit=10)
    stones.bury(A1, reason=GONE, lived=True, until=9.0, now=0.0)
    stones.bury(A0, reason=None, lived=True, until=99.0, now=0.0)
    stone = stones.find("a", now=0.0)
    assert stone is not None
    assert (stone.epoch, stone.reason) == (1, GONE)
    assert stones.find("a", now=9.0) is None


def test_tombstones_are_bounded() -> None:
    stones = Tombstones(limit=2)
    stones.bury(Room("old", 0), reason=None, lived=True, until=1.0, now=0.0)
    for name in "abc":
        stones.bury(Room(name, 0), reason=None, lived=True, until=9.0, now=2.0)
    assert len(stones) == 2
    assert stones.find("a", now=2.0) is None
    stones.purge(now=9.0)
    assert len(stones) == 0


# ---- parking ------------------------------------------------------------------------------------------------------


def test_parked_messages_wait_in_order_for_a_time_that_begins_with_the_first() -> None:
    parking = Parking(limit=10, seconds=5.0)
    assert parking.park(A0, "link", Join(A0), now=1.0)
    assert parking.park(A0, "link", Reservation(A0, 2), now=3.0)
    assert parking.park(Room("b", 0), "link", Join(Room("b", 0)), now=2.0)
    assert (len(parking), parking.next_deadline(), parking.waiting("a")) == (3, 6.0, A0)
    assert parking.overdue(now=5.9) is None
    assert parking.overdue(now=6.0) == A0
    assert [type(parked.message) for parked in parking.take("a")] == [Join, Reservation]
    assert (len(parking), parking.next_deadline(), parking.waiting("a")) == (1, 7.0, None)
    assert parking.take("a") == []


def test_parking_is_bounded_and_forgets_a_lost_link() -> None:
    parking = Parking(limit=2, seconds=5.0)
    assert parking.park(A0, "one", Join(A0), now=0.0)
    assert parking.park(A0, "two", Join(A0), now=0.0)
    assert not parking.park(Room("b", 0), "one", Join(Room("b", 0)), now=0.0)
    assert parking.drop_link("one") == 1
    assert parking.drop_link("one") == 0
    assert [parked.link for parked in parking.take("a")] == ["two"]
    assert len(parking) == 0


# ---- all of it ------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def memory() -> RoomMemory:
    return RoomMemory(clock=Clock(), limits=MemoryLimits(grace_s=10.0, tombstone_s=50.0))


def test_a_live_room_makes_older_epochs_stale(memory: RoomMemory) -> None:
    memory.begin(A1)
    assert memory.fate(A0) is Fate.STALE
    assert memory.fate(A2) is Fate.UNKNOWN
    assert memory.live_older_than(A2) == A1
    assert memory.live_older_than(A1) is None


def test_an_ended_room_is_known_past_its_deadline(memory: RoomMemory) -> None:
    memory.begin(A1)
    memory.end(A1, reason=None, deadline=30.0)
    assert [memory.fate(room) for room in (A0, A1, A2)] == [Fate.STALE, Fate.ENDED, Fate.UNKNOWN]
    memory._clock.now = 39.9  # type: ignore[attr-defined]
    assert memory.fate(A1) is Fate.ENDED
    memory._clock.now = 40.0  # type: ignore[attr-defined]
    assert memory.fate(A1) is Fate.UNKNOWN


def test_a_barred_room_is_told_from_one_that_lived(memory: RoomMemory) -> None:
    memory.end(A0, reason=GONE, deadline=None, lived=False)
    assert memory.fate(A0) is Fate.BARRED
    memory._clock.now = 50.0 + 10.0  # type: ignore[attr-defined]
    assert memory.fate(A0) is Fate.UNKNOWN


def test_a_parked_message_makes_older_epochs_stale_and_is_closed_by_newer_ones(memory: RoomMemory) -> None:
    memory.parking.park(A1, "link", Join(A1), now=0.0)
    assert memory.fate(A0) is Fate.STALE
    assert memory.knows(A1)
    assert not memory.knows(A2)
    assert memory.parked_older_than(A2) == A1
    assert memory.parked_older_than(A1) is None


def test_the_end_of_an_older_epoch_leaves_a_newer_one_alive(memory: RoomMemory) -> None:
    memory.begin(A0)
    memory.begin(A1)
    memory.end(A0, reason=AbortReason.SUPERSEDED, deadline=30.0)
    assert memory.live_older_than(A2) == A1
    assert memory.fate(A0) is Fate.STALE
