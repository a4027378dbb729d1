"""Membership: the book's rules, and replicas and routers meeting through a directory."""

from __future__ import annotations

import asyncio
import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.directory import Directory
from cluster.member_book import MemberBook, MemberView, Snapshot
from cluster.membership import Announcer, MemberWatcher
from protocol.membership import Member, ReplicaRole
from protocol.rooms import PeerAddress


def member(replica_id: str, *, boot: int = 1, draining: bool = False) -> Member:
    address = PeerAddress(replica_id, boot, "127.0.0.1", 4000)
    return Member(address, ReplicaRole.DECODE, page_size=16, max_total_tokens=1024, draining=draining)


def book(*, timeout_s: float = 5.0) -> MemberBook:
    return MemberBook(boot=7, timeout_s=timeout_s, started_at=0.0)


def ids(members: list[Member]) -> list[str]:
    return [each.address.replica_id for each in members]


def test_only_a_change_raises_the_version() -> None:
    members = book()
    assert members.heard(member("a"), 0.0)
    version = members.snapshot(0.0).version
    assert not members.heard(member("a"), 1.0)
    assert members.snapshot(1.0).version == version
    assert members.heard(member("a", draining=True), 2.0)
    assert members.snapshot(2.0).version != version


def test_a_silent_replica_is_dropped_and_a_living_one_stays() -> None:
    members = book(timeout_s=5.0)
    members.heard(member("silent"), 0.0)
    members.heard(member("living"), 0.0)
    members.heard(member("living"), 4.0)
    assert members.next_expiry() == 5.0
    assert members.expire(5.0) == []
    assert ids(members.expire(5.1)) == ["silent"]
    assert ids(members.snapshot(5.1).members) == ["living"]


async def test_the_log_names_who_was_dropped_for_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr("cluster.directory.time", SimpleNamespace(monotonic=lambda: now, time_ns=time.time_ns))
    logger = logging.getLogger("cluster.directory")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)  # whatever other tests have set up above it
    directory = Directory(timeout_s=5.0)
    await directory.heartbeat(member("a"), {})
    await directory.heartbeat(member("b"), {})
    now += 5.1
    await directory.heartbeat(member("b"), {})
    caplog.clear()
    with caplog.at_level("INFO", logger="cluster.directory"):
        assert list(await directory.states()) == ["b"]
    assert [record.getMessage() for record in caplog.records] == [
        "directory: decode a was silent for too long and was dropped; 1 members"
    ]


async def test_a_directory_that_was_stopped_drops_nobody_for_its_own_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looked = 1000.0, asyncio.Event()

    def monotonic() -> float:
        if now > 1000.0:
            looked.set()
        return now

    monkeypatch.setattr("cluster.directory.time", SimpleNamespace(monotonic=monotonic, time_ns=time.time_ns))
    directory = Directory(timeout_s=0.05)
    await directory.heartbeat(member("a"), {})
    known = (await directory.watch(None, patience_s=0.0)).version
    watching = asyncio.create_task(directory.watch(known, patience_s=7200.0))
    await asyncio.sleep(0)  # it is under way
    now += 3600.0
    async with asyncio.timeout(10):
        await looked.wait()
        await directory.heartbeat(member("b"), {})
        assert ids((await watching).members) == ["a", "b"]


def test_a_restarted_replica_replaces_its_earlier_life_and_cannot_be_replaced_by_it() -> None:
    members = book()
    members.heard(member("a", boot=1), 0.0)
    assert members.heard(member("a", boot=2), 1.0)
    assert not members.heard(member("a", boot=1), 2.0)
    assert not members.left("a", boot=1)
    assert [each.address.boot for each in members.snapshot(2.0).members] == [2]
    assert members.left("a", boot=2)
    assert members.snapshot(3.0).members == []


def test_nobody_is_dropped_on_the_word_of_a_directory_that_has_just_started() -> None:
    old, view = book(), MemberView()
    for replica_id in ("a", "b", "c"):
        old.heard(member(replica_id), 0.0)
    assert view.take(old.snapshot(50.0))
    fresh = MemberBook(boot=8, timeout_s=5.0, started_at=100.0)
    fresh.heard(member("b", boot=2), 100.5)
    assert view.take(fresh.snapshot(101.0))
    assert [(each.address.replica_id, each.address.boot) for each in view.members] == [("b", 2), ("a", 1), ("c", 1)]
    fresh.heard(member("c"), 101.0)
    view.take(fresh.snapshot(101.0))
    fresh.left("c", 1)
    assert view.take(fresh.snapshot(102.0))
    assert ids(view.members) == ["b", "a"], "what the new directory has spoken of, it decides"
    assert view.take(fresh.snapshot(105.0))
    assert ids(view.members) == ["b"]
    assert not view.take(fresh.snapshot(106.0))


async def test_watch_answers_at_once_when_there_is_news_and_waits_otherwise() -> None:
    directory = Directory(timeout_s=60.0)
    first = await directory.watch(None, 60.0)
    assert first.members == []
    waiting = asyncio.create_task(directory.watch(first.version, 60.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    await directory.heartbeat(member("a"), {})
    second = await waiting
    assert ids(second.members) == ["a"]
    assert (await directory.watch(second.version, 0.0)).version == second.version


async def test_states_are_those_of_living_replicas() -> None:
    directory = Directory(timeout_s=60.0)
    await directory.heartbeat(member("a"), {"pages": 1})
    await directory.heartbeat(member("b"), {"pages": 2})
    await directory.leave("a", 1)
    assert await directory.states() == {"b": {"pages": 2}}


class Meeting:
    """A watcher's view, with a way to wait for it to become something."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self._news = asyncio.Event()

    def on_members(self, members: list[Member]) -> None:
        self.members = members
        self._news.set()

    async def until(self, wanted: list[str], *, draining: bool = False) -> None:
        async with asyncio.timeout(10.0):
            while sorted(ids(self.members)) != wanted or any(each.draining != draining for each in self.members):
                self._news.clear()
                await self._news.wait()


async def test_a_router_sees_a_replica_come_drain_and_go() -> None:
    directory = Directory(timeout_s=60.0)
    meeting = Meeting()
    watcher = MemberWatcher(directory, on_members=meeting.on_members, patience_s=60.0)
    watcher.start()
    present = [member("a")]
    announcer = Announcer(directory, member=lambda: present[0], state=dict, heartbeat_s=60.0)
    announcer.start()
    await meeting.until(["a"])
    present[0] = member("a", draining=True)
    announcer.announce_now()
    await meeting.until(["a"], draining=True)
    await announcer.stop()
    await meeting.until([])
    await watcher.stop()


class FlakyDirectory:
    """A directory that can be away, and come back as a new one that knows nobody."""

    def __init__(self) -> None:
        self.inner: Directory | None = None

    async def heartbeat(self, member: Member, state: dict[str, Any]) -> None:
        await self._there().heartbeat(member, state)

    async def leave(self, replica_id: str, boot: int) -> None:
        await self._there().leave(replica_id, boot)

    async def watch(self, known: tuple[int, int] | None, patience_s: float) -> Snapshot:
        return await self._there().watch(known, min(patience_s, 0.01))

    def _there(self) -> Directory:
        if self.inner is None:
            raise ConnectionError("the directory is away")
        return self.inner


async def test_a_restarted_directory_is_filled_by_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.membership._RETRY_S", 0.001)
    flaky = FlakyDirectory()
    meeting = Meeting()
    watcher = MemberWatcher(flaky, on_members=meeting.on_members, patience_s=60.0)
    watcher.start()
    announcer = Announcer(flaky, member=lambda: member("a"), state=dict, heartbeat_s=0.001)
    announcer.start()
    flaky.inner = Directory(timeout_s=60.0)
    await meeting.until(["a"])
    flaky.inner = Directory(timeout_s=60.0)
    refilled = await flaky.inner.watch((0, 0), 0.0)
    while not refilled.members:
        refilled = await flaky.inner.watch(refilled.version, 10.0)
    assert ids(refilled.members) == ids(meeting.members) == ["a"]
    await announcer.stop()
    await watcher.stop()
