"""What lets peers into a pool by a transport of its own, beside the page server's shared memory and TCP.

A door belongs to whoever opened it, which closes it before the pool's memory. Its address travels in the replica's
ticket under the name of its transport; the fetching side of that transport knows how to read it.
"""

from __future__ import annotations

from typing import Protocol


class Door(Protocol):
    """The serving end of one transport over one pool. It only lets peers read."""

    @property
    def name(self) -> str:
        """Of the transport."""

    def address(self) -> str:
        """What a peer's transport needs to know, in that transport's own words."""

    def close(self, *, timeout_s: float) -> None:
        """Let nobody in any more, and end what is under way. Raises `TimeoutError` when that does not end in time."""
