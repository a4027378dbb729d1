"""How a half tells of a room's end: the tables of both halves name an ending for each event that ends one."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.rooms import AbortReason, FailureCode


@dataclass(frozen=True, slots=True)
class Ending:
    """What the two others hear of a room that an event ended."""

    code: FailureCode
    """For the router, where the table says `RoomFailed`."""
    reason: AbortReason
    """For the other half, and for the tombstone."""
