"""A peer as a `GroupTransport` knows it."""

from __future__ import annotations

import enum
import ipaddress
from dataclasses import dataclass, field

from protocol.handshake import RegionTicket
from transfer.dist.pair import Pair
from transfer.dist.pieces import Progress
from transfer.io_loop import Timer
from transfer.jobs import PageCopy, Peer


class PeerState(enum.Enum):
    JOINING = enum.auto()
    READY = enum.auto()
    LOST = enum.auto()
    DETACHED = enum.auto()


_LEGAL = {
    PeerState.JOINING: {PeerState.READY, PeerState.LOST, PeerState.DETACHED},
    PeerState.READY: {PeerState.LOST, PeerState.DETACHED},
    PeerState.LOST: {PeerState.READY, PeerState.DETACHED},
    PeerState.DETACHED: set[PeerState](),
}


@dataclass(kw_only=True, eq=False)
class Grouped:
    """All state of a peer."""

    peer: Peer
    retry_s: float
    """From the loss of the next group to the attempt after it."""
    state: PeerState = PeerState.JOINING
    pair: Pair | None = None
    """The group that is, or is being made."""
    copies: dict[PageCopy, Progress] = field(default_factory=dict)
    """Those not answered yet."""
    timer: Timer | None = None
    """To the end of our patience, or to the next attempt."""
    error: str = ""
    """What copies are answered that end with the group."""

    def move_to(self, state: PeerState) -> None:
        assert state in _LEGAL[self.state], f"a peer cannot go from {self.state} to {state}"
        self.state = state


def address_of(ticket: RegionTicket, backend: str) -> tuple[str, int] | None:
    """Where the peer's door is; None when there is none, or what is said of it makes no sense."""
    host, _, port = ticket.doors.get(backend, "").rpartition(":")
    try:
        numeric = str(ipaddress.ip_address(host))
    except ValueError:
        return None
    return (numeric, int(port)) if port.isascii() and port.isdigit() and 0 < int(port) < 2**16 else None
