"""Both sides of the directory: a replica announces itself, a router watches who is there.

Lifecycle: each is one task on the event loop, started by its owner and ended by `stop`. Neither ever gives up: a call
that fails or does not come back in time is made again. Nothing here is on the way of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Protocol

from cluster.background_task import BackgroundTask
from cluster.member_book import MemberView, Snapshot
from protocol.membership import Member

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 5.0
_RETRY_S = 0.5


class DirectoryClient(Protocol):
    """The directory's methods, as a Serve deployment handle or the directory itself offers them."""

    async def heartbeat(self, member: Member, state: dict[str, Any]) -> None: ...
    async def leave(self, replica_id: str, boot: int) -> None: ...
    async def watch(self, known: tuple[int, int] | None, patience_s: float) -> Snapshot: ...


class Announcer:
    """Tells the directory every `heartbeat_s` that this replica lives, and at once when something about it changes."""

    def __init__(
        self,
        directory: DirectoryClient,
        *,
        member: Callable[[], Member],
        state: Callable[[], dict[str, Any]],
        heartbeat_s: float,
    ) -> None:
        self._directory = directory
        self._member = member
        self._state = state
        self._heartbeat_s = heartbeat_s
        self._now = asyncio.Event()
        self._task = BackgroundTask(self._run)

    def start(self) -> None:
        self._task.start()

    def announce_now(self) -> None:
        """Do not wait for the next heartbeat: the member has changed."""
        self._now.set()

    async def stop(self) -> None:
        """End the heartbeats and take this replica off the list."""
        if not self._task.started:
            return
        await self._task.stop()
        address = self._member().address
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                await self._directory.leave(address.replica_id, address.boot)
        except Exception as error:  # the directory may be gone before us; it forgets us by itself
            log.info("could not sign off from the directory: %s", error)

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    await self._directory.heartbeat(self._member(), self._state())
            except Exception as error:  # whatever it is, the next heartbeat is due
                log.warning("heartbeat failed, trying again: %s", error)
            self._now.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._now.wait(), self._heartbeat_s)


class MemberWatcher:
    """Keeps a router's list of replicas: calls `on_members` whenever it changes."""

    def __init__(
        self,
        directory: DirectoryClient,
        *,
        on_members: Callable[[list[Member]], None],
        patience_s: float,
    ) -> None:
        self._directory = directory
        self._on_members = on_members
        self._patience_s = patience_s
        self._view = MemberView()
        self._task = BackgroundTask(self._run)

    def start(self) -> None:
        self._task.start()

    async def stop(self) -> None:
        await self._task.stop()

    async def _run(self) -> None:
        version: tuple[int, int] | None = None
        while True:
            try:
                async with asyncio.timeout(self._patience_s + _CALL_TIMEOUT_S):
                    snapshot = await self._directory.watch(version, self._patience_s)
            except Exception as error:  # go on with the replicas we know
                log.warning("the directory does not answer, asking again: %s", error)
                version = None
                await asyncio.sleep(_RETRY_S)
                continue
            version = snapshot.version
            if self._view.take(snapshot):
                self._on_members(self._view.members)
