"""What a transport is to the fetcher: something that can run one `PageCopy` at a time or many, and never blocks its
caller.

Shared memory (`shm.py`) and our own TCP (`tcp.py`) are two; the fetcher knows neither. Every method may be called
from any thread and waits for nobody; the work happens in the transport's own threads, but what is short may be done
within `start`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from protocol.handshake import RegionTicket
from transfer.jobs import PageCopy, Peer

AGEING_BYTES_PER_S = 256 << 20
"""Short copies go first, but not for ever: a copy gets as far ahead of its turn as its size divided by this. So 16 MB
wait at most for smaller ones that come within the next 60 ms, 1 GB for those of the next 4 s."""


@dataclass(frozen=True, kw_only=True)
class TransferTimings:
    """Seconds."""

    handshake_s: float = 3.0
    """From the first byte of a connection until both sides have proved who they are."""
    retry_s: float = 2.0
    """After a peer's shared memory could not be had, until it is asked for again."""
    stall_s: float = 60.0
    """A server lets go of a receiver that takes no byte for this long."""
    silence_s: float = 10.0
    """A receiver lets go of a connection that brings no byte of what it asked for in this time."""
    close_s: float = 10.0
    """A closing server or fetcher waits this long for its threads."""
    join_s: float = 60.0
    """From the first contact until there is a process group of two helper processes; a server that forks them and has
    yet to load torch takes a second or two, and many times that on a busy machine."""
    patience_s: float = 5.0
    """Copies wait this long for a peer's first process group before they go another way."""
    piece_s: float = 10.0
    """Within which a process group moves each piece of a copy, up to 16 MB or one page; else it is given up."""
    drain_s: float = 1.0
    """Within which it brings what is still on its way for a copy that was ended; else it is given up too."""


class Transport(Protocol):
    """The contract of `jobs.py` holds: exactly one `copy.on_ended` for each `start`, after the last write."""

    @property
    def name(self) -> str:
        """As in configuration and in results."""

    @property
    def takes_grains(self) -> bool:
        """Whether it can copy between pools of unequal shape (`layout.py`)."""

    def reaches(self, ticket: RegionTicket) -> bool:
        """Whether a peer with this ticket can be reached at all."""

    def attach(self, peer: Peer) -> None:
        """Begin what first contact needs, so that the first copy need not wait for it."""

    def start(self, copy: PageCopy) -> None:
        """Run `copy` when its turn comes."""

    def stop(self, copy: PageCopy) -> None:
        """End `copy` soon, whatever its peer does. May come before `start`, or after the end."""

    def detach(self, peer: Peer) -> None:
        """Let go of everything held for `peer` once its copies, already asked to stop, have ended."""

    def close(self, *, timeout_s: float) -> None:
        """End threads and connections; no copy is running any more. Raises `TimeoutError` when a thread does not
        end."""


def turn(copy: PageCopy) -> float:
    """Orders waiting copies: the lowest goes first."""
    return copy.queued_at + (copy.total_bytes - copy.done_pages * copy.page_bytes) / AGEING_BYTES_PER_S
