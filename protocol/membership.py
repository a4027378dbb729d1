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
