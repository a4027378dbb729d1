"""The directory: which replicas live, told by themselves and read by routers; and what routers tell each other.

Lifecycle: one deployment of one replica. Replicas send a heartbeat as soon as they are ready and every second from then
on, and say so when they leave; routers ask for changes and are answered at once when there is one. It holds nothing
that heartbeats do not bring back, so a restarted directory knows everyone again after one heartbeat each; until then
its lists say that they are not complete.

It is on nobody's request path: while it is away, routers go on with the replicas they know.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from cluster.member_book import MemberBook, Snapshot
from cluster.router_board import RouterBoard
from cluster.serve_logs import log_where_serve_does
from protocol.membership import Member, RouterReport

log = logging.getLogger(__name__)

_PAUSE_S = 1.0
"""A directory that wakes so much later than it meant to did not listen meanwhile; heartbeats wait to be read."""


class Directory:
    """Serve deployment. Every method is cheap but `watch`, which waits."""

    def __init__(self, timeout_s: float) -> None:
        log_where_serve_does()
        self._book = MemberBook(boot=time.time_ns(), timeout_s=timeout_s, started_at=time.monotonic())
        self._routers = RouterBoard(timeout_s=timeout_s)
        self._states: dict[str, dict[str, Any]] = {}
        self._changed = asyncio.Event()

    async def heartbeat(self, member: Member, state: dict[str, Any]) -> None:
        """`member` lives; `state` is what it wants to be seen by operators."""
        self._states[member.address.replica_id] = state
        self._note(
            self._book.heard(member, time.monotonic()), f"{member.role.value} {member.address.replica_id} joined"
        )

    async def leave(self, replica_id: str, boot: int) -> None:
        """This life of the replica ends."""
        self._note(self._book.left(replica_id, boot), f"{replica_id} left")

    async def watch(self, known: tuple[int, int] | None, patience_s: float) -> Snapshot:
        """The list, as soon as its version is not `known`; the same list again after `patience_s`."""
        give_up_at = time.monotonic() + patience_s
        while True:
            now = time.monotonic()
            self._drop_silent(now)
            snapshot = self._book.snapshot(now)
            if snapshot.version != known or now >= give_up_at:
                return snapshot
            wake_at = min(give_up_at, self._book.next_expiry() or give_up_at)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), max(0.0, wake_at - now) + 0.001)
            now = time.monotonic()
            if now - wake_at > _PAUSE_S:
                self._book.paused(now)

    async def exchange(self, report: RouterReport) -> list[RouterReport]:
        """A router's report for those of all routers that live."""
        return self._routers.exchange(report, time.monotonic())

    async def states(self) -> dict[str, dict[str, Any]]:
        """What each living replica last said about itself, by replica id."""
        self._drop_silent(time.monotonic())
        return self._states

    def _drop_silent(self, now: float) -> None:
        for member in self._book.expire(now):
            replica = f"{member.role.value} {member.address.replica_id}"
            self._note(True, f"{replica} was silent for too long and was dropped")

    def _note(self, changed: bool, what: str) -> None:
        if not changed:
            return
        living = {member.address.replica_id for member in self._book.snapshot(time.monotonic()).members}
        log.info("directory: %s; %d members", what, len(living))
        self._states = {replica_id: state for replica_id, state in self._states.items() if replica_id in living}
        waiting, self._changed = self._changed, asyncio.Event()
        waiting.set()
