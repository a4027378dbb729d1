"""The links of one replica, by id: those it accepted, and those its decode half makes to prefill replicas.

Lives on the event loop. The engine thread knows links only by their id: an opaque string that names one connection
(not one peer), so an event of a lost connection can never be taken for one of its successor. Messages sent over a
link that is still being made wait here, in order; if it cannot be made, its loss is reported like any other.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from cluster.engine_events import Event, LinkLost, LinkUp, Received
from protocol.codec import AnyMessage
from protocol.control import EndRequests, RegionMoved
from protocol.endpoints import Identity, connect
from protocol.handshake import LinkRole, RegionTicket
from protocol.link import Link, LinkError, LinkTimings
from protocol.rooms import Message, PeerAddress

log = logging.getLogger(__name__)


class PeerLinks:
    """Gives every connection an id and turns what happens on it into events for the engine thread."""

    def __init__(
        self,
        *,
        secret: bytes,
        identity: Identity,
        post: Callable[[Event], None],
        attach: Callable[[PeerAddress, RegionTicket], None],
        detach: Callable[[PeerAddress], None],
        loop: asyncio.AbstractEventLoop,
        timings: LinkTimings | None = None,
    ) -> None:
        self._secret = secret
        self._identity = identity
        self._post = post
        self._attach = attach
        self._detach = detach
        self._loop = loop
        self._timings = timings or LinkTimings()
        self._counter = itertools.count(1)
        self._by_id: dict[str, Link] = {}
        self._ids: dict[Link, str] = {}
        self._outgoing: dict[PeerAddress, str] = {}
        """Written by the engine thread, cleared by the event loop; each is one atomic operation."""
        self._waiting: dict[str, list[Message]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- called from the engine thread ----------------------------------------------------------------------

    def connect(self, address: PeerAddress) -> str:
        """The id of the link to a prefill replica, made now if there is none; `LinkLost` follows if it cannot be made.

        An id is taken out of `_outgoing` before its loss is posted, so whoever got it here hears of that loss.
        """
        link_id = self._outgoing.get(address)
        if link_id is None:
            link_id = f"{address.replica_id}@{address.boot}#{next(self._counter)}"
            self._outgoing[address] = link_id
            self._loop.call_soon_threadsafe(self._start_connecting, link_id, address)
        return link_id

    # ---- called on the event loop -----------------------------------------------------------------------------

    def deliver(self, outgoing: list[tuple[str, Message]]) -> None:
        """Send each message over its link; those for a link that is gone are dropped, its loss is an event."""
        for link_id, message in outgoing:
            link = self._by_id.get(link_id)
            if link is not None:
                link.send(message)
            elif link_id in self._waiting:
                self._waiting[link_id].append(message)

    def accepted(self, link: Link) -> None:
        """`LinkServer`'s `on_up`."""
        link_id = f"{link.peer_id}@{link.boot}#{next(self._counter)}"
        self._add(link_id, link)
        self._post(LinkUp(link_id, link.role))

    def received(self, link: Link, message: AnyMessage) -> None:
        """A message for the engine thread, or one that routers tell each other by way of this replica."""
        if isinstance(message, EndRequests) and link.role is LinkRole.ROUTER:
            for other in list(self._ids):  # a link that is too full ends while it is written to
                if other.role is LinkRole.ROUTER and other is not link:
                    other.send(message)
            return
        link_id = self._ids.get(link)
        if link_id is not None:
            self._post(Received(link_id, message))

    def lost(self, link: Link, why: str) -> None:
        link_id = self._ids.pop(link, None)
        if link_id is None:
            return
        del self._by_id[link_id]
        log.info("link %s lost: %s", link_id, why)
        self._post(LinkLost(link_id))

    def close(self) -> None:
        """End every link this replica made or accepted, and stop making new ones."""
        for task in self._tasks:
            task.cancel()
        for link in list(self._ids):
            link.close()

    # ---- inner workings ---------------------------------------------------------------------------------------

    def _add(self, link_id: str, link: Link) -> None:
        self._by_id[link_id] = link
        self._ids[link] = link_id

    def _start_connecting(self, link_id: str, address: PeerAddress) -> None:
        self._waiting[link_id] = []
        task = self._loop.create_task(self._connect(link_id, address))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, link_id: str, address: PeerAddress) -> None:
        def received(link: Link, message: AnyMessage) -> None:
            if not isinstance(message, RegionMoved):
                self.received(link, message)
                return
            link.region = message.region
            if link in self._ids:  # or else it is attached in a moment
                self._attach_region(address, link)

        def lost(link: Link, why: str) -> None:
            self._outgoing.pop(address, None)
            self._detach(address)
            self.lost(link, why)

        try:
            link = await connect(
                address,
                secret=self._secret,
                identity=self._identity,
                on_message=received,
                on_lost=lost,
                timings=self._timings,
            )
            if not link.is_open:
                raise LinkError(f"{address.replica_id}: lost as soon as it was made")
        except LinkError as error:
            log.warning("cannot reach prefill replica: %s", error)
            del self._waiting[link_id]
            self._outgoing.pop(address, None)
            self._post(LinkLost(link_id))
            return
        self._add(link_id, link)
        self._attach_region(address, link)
        for message in self._waiting.pop(link_id):
            link.send(message)

    def _attach_region(self, address: PeerAddress, link: Link) -> None:
        if link.region is not None:
            try:
                self._attach(address, link.region)
            except ValueError as error:
                link.fail(f"pages of {address.replica_id} cannot be taken: {error}")
