"""What a replica tells the directory about itself, and what routers read there."""

from __future__ import annotations

import enum

import msgspec

from protocol.rooms import PeerAddress


class ReplicaRole(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"


class Member(msgspec.Struct, frozen=True):
    """One living replica. `address.boot` changes with every life, so a restarted one is a new member."""

    address: PeerAddress
    role: ReplicaRole
    page_size: int
    max_total_tokens: int
    """Tokens the whole KV pool holds."""
    draining: bool = False


class TenantUse(msgspec.Struct, frozen=True):
    """What one router has let in for a tenant, counted since that router started."""

    started: int = 0
    """Requests."""
    spent: int = 0
    """Tokens, of prompts and outputs."""
    concurrent: int = 0
    """Requests under way now."""
    levels: dict[str, float] = {}
    """What the router believes is left of each limit, by its name."""


class RouterReport(msgspec.Struct, frozen=True):
    """What a router tells the others, by way of the directory, every second."""

    key: str
    """Names this life of the router, as the ids of its responses do."""
    address: PeerAddress
    """Where other routers reach it."""
    tenants: dict[str, TenantUse]
