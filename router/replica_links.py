"""The persistent link from this router to one replica.

A `ReplicaLink` connects as soon as its replica is listed, and again after each loss, with growing pauses, for as long
as the replica stays listed. Everything a link says goes to the `ReplicaEvents` it was given. Event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from protocol.codec import AnyMessage
from protocol.endpoints import Identity, connect
from protocol.link import Link, LinkError, LinkTimings
from router.replica_view import ReplicaView

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0

_LOGGER = logging.getLogger(__name__)


class ReplicaEvents(Protocol):
    """Who hears of replicas; called on the event loop, must not raise or wait."""

    def replica_up(self, view: ReplicaView) -> None: ...

    def replica_message(self, view: ReplicaView, message: AnyMessage) -> None: ...

    def replica_lost(self, view: ReplicaView, why: str) -> None: ...


class ReplicaLink:
    """Keeps `view.link` up while the replica is listed."""

    def __init__(
        self, view: ReplicaView, *, events: ReplicaEvents, secret: bytes, identity: Identity, timings: LinkTimings
    ) -> None:
        self.view = view
        self._events = events
        self._secret = secret
        self._identity = identity
        self._timings = timings
        self._lost = asyncio.Event()
        self._task = asyncio.create_task(self._keep_up(), name=f"link to {view.address.replica_id}")

    @property
    def is_over(self) -> bool:
        """Retired, and its connection gone."""
        return self._task.done()

    def retire(self) -> None:
        """The replica is no longer listed: make no new connection; a living one goes on while rooms are open on it."""
        self.view.listed = False
        if not self.view.is_up:
            self._task.cancel()
        elif not self.view.rooms:
            self._close_link()

    async def close(self) -> None:
        """End the link and the task that keeps it up."""
        self.view.listed = False
        self._task.cancel()
        self._close_link()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_up(self) -> None:
        pause = _FIRST_PAUSE_S
        while self.view.listed:
            try:
                link = await connect(
                    self.view.address,
                    secret=self._secret,
                    identity=self._identity,
                    on_message=self._on_message,
                    on_lost=self._on_lost,
                    timings=self._timings,
                )
            except LinkError as error:
                _LOGGER.warning("no link to %s, next try in %.2f s: %s", self.view.address.replica_id, pause, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            if not link.is_open:  # lost in the moment between being made and being handed over
                continue
            pause = _FIRST_PAUSE_S
            self._lost.clear()
            self.view.link = link
            self._events.replica_up(self.view)
            await self._lost.wait()

    def _on_message(self, link: Link, message: AnyMessage) -> None:
        self._events.replica_message(self.view, message)
        if not self.view.listed and not self.view.rooms:
            self._close_link()

    def _on_lost(self, link: Link, why: str) -> None:
        if self.view.link is not link:
            return
        self.view.link = None
        self.view.load = None
        self._lost.set()
        level = logging.WARNING if self.view.listed else logging.INFO
        _LOGGER.log(level, "lost the link to %s: %s", self.view.address.replica_id, why)
        self._events.replica_lost(self.view, why)

    def _close_link(self) -> None:
        if self.view.link is not None:
            self.view.link.close()
