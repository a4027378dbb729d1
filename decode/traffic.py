"""What copies have brought, by transport and by peer: written by the decode half alone, read by the metrics export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from protocol.rooms import PeerAddress
from transfer.jobs import FetchResult


@dataclass
class Traffic:
    """Copies that ended; cancelled ones are in none of the numbers, failed ones in `failures` only."""

    copies: int = 0
    failures: int = 0
    bytes: int = 0
    seconds: float = 0.0
    """From first to last byte, summed over copies: `bytes / seconds` is the bandwidth of one copy."""
    queue_seconds: float = 0.0
    """From the request of a copy until its first byte, summed over copies."""

    def add(self, result: FetchResult) -> None:
        if result.ok:
            self.copies += 1
            self.bytes += result.bytes
            self.seconds += result.seconds
            self.queue_seconds += result.queued_seconds
        elif not result.cancelled:
            self.failures += 1


class TrafficBook:
    """For each transport since the half was made; for each peer while there is a link to it, so that peers which come
    and go do not add up. A copy that no transport began counts under the transport "none"."""

    def __init__(self) -> None:
        self.by_transport: dict[str, Traffic] = {}
        self._by_peer: dict[PeerAddress, dict[str, Traffic]] = {}

    def count(self, result: FetchResult, *, linked: bool) -> None:
        """A copy has ended; `linked` says whether its peer is still there."""
        transport = result.transport or "none"
        self.by_transport.setdefault(transport, Traffic()).add(result)
        if linked:
            self._by_peer.setdefault(result.peer, {}).setdefault(transport, Traffic()).add(result)

    def forget(self, peer: PeerAddress) -> None:
        """The link to `peer` is gone."""
        self._by_peer.pop(peer, None)

    def by_peer(self) -> Iterator[tuple[PeerAddress, str, Traffic]]:
        """(peer, transport, traffic)."""
        for peer, by_transport in self._by_peer.items():
            for transport, traffic in by_transport.items():
                yield peer, transport, traffic
