"""Messages about no room: ending requests wherever they are, dropping prefix caches, and doors that have moved."""

from __future__ import annotations

from protocol.handshake import RegionTicket
from protocol.rooms import Count, Message


class EndRequests(Message, frozen=True, tag="end_requests"):
    """End what a client calls by that name, or everything; what there is by then is the answer.

    Router -> replica, which passes it on to every other router: routers do not know each other's requests, but replicas
    know all routers. It may come by way of several replicas; `number` tells that it is the same.
    """

    number: int
    """Drawn by the router that was asked."""
    name: str | None
    """None for everything."""


class FlushCache(Message, frozen=True, tag="flush_cache"):
    """Router -> replica: drop all cached prefixes, if no room is open."""

    number: int


class CacheFlushed(Message, frozen=True, tag="cache_flushed"):
    """Replica -> router: the answer."""

    number: int
    pages: Count
    """How many were freed."""
    rooms: Count
    """Open rooms; where there are any, nothing was done."""


class RegionMoved(Message, frozen=True, tag="region_moved"):
    """Replica -> those that take pages out of its pool: from now on it is reached like this."""

    region: RegionTicket
