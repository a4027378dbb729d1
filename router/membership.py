"""The replicas that exist, as the directory last said, each with its link.

`cluster/` calls `MemberTable.update` on the router's event loop whenever the directory changes. A replica in a new life
(another boot) is a new member; one that is no longer listed gets nothing new and may finish what it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from protocol.endpoints import Identity
from protocol.link import LinkTimings
from protocol.membership import Member, ReplicaRole
from router.replica_links import ReplicaEvents, ReplicaLink
from router.replica_view import ReplicaKey, ReplicaView


class MemberTable:
    """Views of all members, and the links behind them."""

    def __init__(self, *, events: ReplicaEvents, secret: bytes, identity: Identity, timings: LinkTimings) -> None:
        self._events = events
        self._secret = secret
        self._identity = identity
        self._timings = timings
        self._links: dict[ReplicaKey, ReplicaLink] = {}
        self._retired: list[ReplicaLink] = []

    def update(self, members: Iterable[Member]) -> None:
        """Take the directory's present list. Call on the event loop."""
        self._retired = [link for link in self._retired if not link.is_over]
        listed = {(member.address.replica_id, member.address.boot): member for member in members}
        for key, link in list(self._links.items()):
            if key in listed:
                link.view.member = listed[key]
            else:
                del self._links[key]
                link.retire()
                self._retired.append(link)
        for key, member in listed.items():
            if key not in self._links:
                self._links[key] = ReplicaLink(
                    ReplicaView(member),
                    events=self._events,
                    secret=self._secret,
                    identity=self._identity,
                    timings=self._timings,
                )

    @property
    def views(self) -> list[ReplicaView]:
        return [link.view for link in self._links.values()]

    @property
    def prefills(self) -> list[ReplicaView]:
        return [view for view in self.views if view.role is ReplicaRole.PREFILL]

    @property
    def decodes(self) -> list[ReplicaView]:
        """Decode replicas, and aggregated ones, which decode too."""
        return [view for view in self.views if view.role is not ReplicaRole.PREFILL]

    @property
    def is_whole(self) -> bool:
        """A request can be served as the cluster's mode has it: by a pair, or by an aggregated replica."""
        usable = {view.role for view in self.views if view.usable}
        return ReplicaRole.AGGREGATED in usable or usable >= {ReplicaRole.PREFILL, ReplicaRole.DECODE}

    async def close(self) -> None:
        """End every link; the replicas abort what this router had open."""
        links = [*self._links.values(), *self._retired]
        self._links.clear()
        self._retired.clear()
        await asyncio.gather(*(link.close() for link in links))
