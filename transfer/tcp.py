"""Transport between hosts: pages asked for over TCP, received straight into ours.

Each attached peer has a few connections, made when copies need them and kept for the next; each runs one copy at a
time, the one with the least to do first. All sockets belong to the fetcher's one loop and never block it, so a peer
that hangs holds up its own copies only; `stop` closes their connections. While the loop sleeps, a short copy is asked
for by whoever wants it, in less time than the loop takes to wake; its bytes are received by the loop.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.handshake import RegionTicket
from transfer.io_loop import IoLoop
from transfer.jobs import PageCopy, Peer
from transfer.landing import Landing
from transfer.tcp_connection import ConnectionState, PageConnection
from transfer.transport import TransferTimings, turn

_MAX_CONNECTIONS_PER_PEER = 4


@dataclass(kw_only=True, eq=False)
class _Connected:
    """A peer as this transport knows it."""

    peer: Peer
    connections: list[PageConnection] = field(default_factory=list)
    heap: list[tuple[float, int, PageCopy]] = field(default_factory=list)
    waiting: set[PageCopy] = field(default_factory=set)
    """Those in the heap that were not stopped since."""


class TcpTransport:
    """Implements `transport.Transport` for peers that serve their pages over TCP. All state is the loop's."""

    name = "tcp"
    takes_grains = True

    def __init__(
        self,
        loop: IoLoop,
        landing: Landing,
        *,
        secret: bytes,
        at_once_bytes: int,
        clock: Callable[[], float],
        timings: TransferTimings,
    ) -> None:
        self._loop = loop
        self._landing = landing
        self._secret = secret
        self._at_once_bytes = at_once_bytes
        self._clock = clock
        self._timings = timings
        self._peers: dict[Peer, _Connected] = {}
        self._retried: set[PageCopy] = set()
        self._order = itertools.count()

    def reaches(self, ticket: RegionTicket) -> bool:
        return ticket.tcp_port != 0

    def attach(self, peer: Peer) -> None:
        self._loop.call_soon(lambda: self._attach(peer))

    def start(self, copy: PageCopy) -> None:
        call = self._loop.call_at_once if copy.total_bytes <= self._at_once_bytes else self._loop.call_soon
        call(lambda: self._start(copy))

    def stop(self, copy: PageCopy) -> None:
        copy.stop_requested = True
        self._loop.call_soon(lambda: self._stop(copy))

    def detach(self, peer: Peer) -> None:
        self._loop.call_soon(lambda: self._detach(peer))

    def close(self, *, timeout_s: float) -> None:
        self._loop.call_soon(self._close)

    # ---- in the loop's thread -----------------------------------------------------------------------------

    def _attach(self, peer: Peer) -> None:
        self._connect(self._peers.setdefault(peer, _Connected(peer=peer)))

    def _start(self, copy: PageCopy) -> None:
        if copy.stop_requested:
            copy.on_ended(copy, "stopped")
            return
        entry = self._peers.setdefault(copy.peer, _Connected(peer=copy.peer))
        self._queue(entry, copy)
        self._pump(entry)

    def _stop(self, copy: PageCopy) -> None:
        entry = self._peers.get(copy.peer)
        if entry is None:
            return
        if copy in entry.waiting:
            entry.waiting.remove(copy)
            self._end(copy, "stopped")
            return
        for connection in entry.connections:
            if connection.copy is copy:
                connection.close("stopped")
                return

    def _detach(self, peer: Peer) -> None:
        entry = self._peers.pop(peer, None)
        if entry is None:
            return
        for connection in list(entry.connections):
            connection.close("detached")
        self._end_waiting(entry, "detached")

    def _close(self) -> None:
        for peer in list(self._peers):
            self._detach(peer)

    def _queue(self, entry: _Connected, copy: PageCopy) -> None:
        heapq.heappush(entry.heap, (turn(copy), next(self._order), copy))
        entry.waiting.add(copy)

    def _pump(self, entry: _Connected) -> None:
        """Give waiting copies to idle connections, and make connections for the rest."""
        for connection in list(entry.connections):
            if connection.state is ConnectionState.IDLE:
                copy = self._pop(entry)
                if copy is None:
                    return
                connection.run(copy)
        coming = sum(connection.state is ConnectionState.HANDSHAKE for connection in entry.connections)
        while len(entry.waiting) > coming and len(entry.connections) < _MAX_CONNECTIONS_PER_PEER:
            self._connect(entry)
            coming += 1

    def _pop(self, entry: _Connected) -> PageCopy | None:
        while entry.heap:
            copy = heapq.heappop(entry.heap)[2]
            if copy in entry.waiting:
                entry.waiting.remove(copy)
                return copy
        return None

    def _connect(self, entry: _Connected) -> None:
        entry.connections.append(
            PageConnection(
                self._loop,
                self._landing,
                entry.peer,
                transport=self.name,
                secret=self._secret,
                clock=self._clock,
                timings=self._timings,
                on_change=lambda connection: self._changed(entry, connection),
                on_copy_ended=lambda connection, copy, error: self._copied(entry, connection, copy, error),
            )
        )

    def _changed(self, entry: _Connected, connection: PageConnection) -> None:
        closed = connection.state is ConnectionState.CLOSED
        if closed:
            entry.connections.remove(connection)
        if self._peers.get(entry.peer) is not entry:
            return  # detached: nothing more is begun
        if not closed or connection.copies:
            self._pump(entry)
        elif not entry.connections:
            # No connection can be made. The copies that wait for one are answered now: whoever gave them to us may
            # know another way. While another connection lives they wait for that instead.
            self._end_waiting(entry, f"no connection to the peer: {connection.error}")

    def _copied(self, entry: _Connected, connection: PageConnection, copy: PageCopy, error: str | None) -> None:
        """A copy ended. One that failed on a connection used before is tried once more, on a new one: the peer may
        have closed the old one long ago."""
        stale = error is not None and connection.copies > 1 and copy.done_pages == 0 and copy not in self._retried
        if stale and not copy.stop_requested and self._peers.get(entry.peer) is entry:
            self._retried.add(copy)
            self._queue(entry, copy)
            return
        self._end(copy, error)

    def _end_waiting(self, entry: _Connected, error: str) -> None:
        orphans = list(entry.waiting)
        entry.waiting.clear()
        entry.heap.clear()
        for copy in orphans:
            self._end(copy, error)

    def _end(self, copy: PageCopy, error: str | None) -> None:
        self._retried.discard(copy)
        copy.on_ended(copy, error)
