"""What lets peers into a pool by a transport of its own, beside the page server's shared memory and TCP.

A door belongs to whoever opened it, which closes it before the pool's memory. Its address travels in the replica's
ticket under the name of its transport; the fetching side of that transport knows how to read it.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from protocol.handshake import RegionTicket


class Door(Protocol):
    """The serving end of one transport over one pool. It only lets peers read."""

    @property
    def name(self) -> str:
        """Of the transport."""

    def address(self) -> str:
        """What a peer's transport needs to know, in that transport's own words. A door that had to be opened anew may
        have another one (`doors.DoorParts.on_moved`)."""

    def close(self, *, timeout_s: float) -> None:
        """Let nobody in any more, and end what is under way. Raises `TimeoutError` when that does not end in time."""


def moved_doors(before: RegionTicket, after: RegionTicket) -> set[str] | None:
    """The names of the doors that are elsewhere, come or gone; None when the tickets differ in anything else."""
    if msgspec.structs.replace(before, doors=after.doors) != after:
        return None
    return {name for name, _ in before.doors.items() ^ after.doors.items()}
