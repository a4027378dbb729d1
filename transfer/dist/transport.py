"""Transport through process groups: one helper process per peer, which takes part in the group so that we need not.

A peer's life here: JOINING (its first group is being made; copies wait) -> READY (copies run, piece by piece, the one
with the least to do first) -> DETACHED. When the first group is long in coming, or a group cannot be made or ends, the
peer is LOST: its copies are answered, so that they can go another way, while a group is tried in the background, less
and less often until one has moved something.

A copy that ends is answered at once if nothing is on its way into its pages; else when that has landed, or our helper
process has ended and can write nowhere any more (`pair.py`), whatever became of the peer meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from protocol.handshake import RegionTicket
from transfer.dist.grouped import Grouped, PeerState, address_of
from transfer.dist.helpers import Helpers
from transfer.dist.orders import BackendName
from transfer.dist.pair import Pair, PairState
from transfer.dist.pieces import Progress
from transfer.faults import InjectedFault
from transfer.io_loop import IoLoop
from transfer.jobs import PageCopy, Peer
from transfer.landing import Landing
from transfer.transport import TransferTimings, turn

_MAX_RETRY_S = 60.0


class GroupTransport:
    """Implements `transport.Transport` for peers with a `GroupDoor` of the same backend. All state is the loop's."""

    takes_grains = False

    def __init__(
        self,
        backend: BackendName,
        loop: IoLoop,
        landing: Landing,
        *,
        secret: bytes,
        clock: Callable[[], float],
        timings: TransferTimings,
    ) -> None:
        if landing.fd is None:
            raise ValueError(
                f"transport {backend} fills a KV pool from a helper process, which may not write into this one; "
                "make it a SharedMemory with shared_writable=True"
            )
        self._backend: BackendName = backend
        self._pool_fd = landing.fd
        self._loop = loop
        self._landing = landing
        self._secret = secret
        self._clock = clock
        self._timings = timings
        self._peers: dict[Peer, Grouped] = {}
        self._helpers = Helpers(loop, clock=clock, timings=timings)

    @property
    def name(self) -> str:
        return self._backend

    def reaches(self, ticket: RegionTicket) -> bool:
        return address_of(ticket, self._backend) is not None

    def attach(self, peer: Peer) -> None:
        self._loop.call_soon(lambda: self._attach(peer))

    def start(self, copy: PageCopy) -> None:
        self._loop.call_soon(lambda: self._start(copy))

    def stop(self, copy: PageCopy) -> None:
        copy.stop_requested = True
        self._loop.call_soon(lambda: self._stop(copy))

    def detach(self, peer: Peer) -> None:
        self._loop.call_soon(lambda: self._detach(peer))

    def close(self, *, timeout_s: float) -> None:
        closed = threading.Event()

        def close() -> None:
            for peer in list(self._peers):
                self._detach(peer)
            closed.set()

        self._loop.call_soon(close)
        if not closed.wait(timeout_s):
            raise TimeoutError(f"the loop of the {self._backend} transport is busy for {timeout_s} s")
        self._helpers.close(timeout_s=timeout_s)

    # ---- in the loop's thread -----------------------------------------------------------------------------

    def _attach(self, peer: Peer) -> None:
        if peer not in self._peers:
            entry = self._peers[peer] = Grouped(peer=peer, retry_s=self._timings.retry_s)
            late = self._clock() + self._timings.patience_s
            entry.timer = self._loop.call_at(late, lambda: self._lose_patience(entry))
            self._connect(entry)

    def _start(self, copy: PageCopy) -> None:
        if copy.stop_requested:
            copy.on_ended(copy, "stopped")
            return
        self._attach(copy.peer)
        entry = self._peers[copy.peer]
        if entry.state is PeerState.LOST:
            copy.on_ended(copy, entry.error)
            return
        entry.copies[copy] = Progress(copy)
        self._pump(entry)

    def _stop(self, copy: PageCopy) -> None:
        entry = self._peers.get(copy.peer)
        if entry is not None and copy in entry.copies:
            self._end(entry, copy, "stopped")

    def _detach(self, peer: Peer) -> None:
        entry = self._peers.pop(peer, None)
        if entry is None:
            return
        entry.move_to(PeerState.DETACHED)
        entry.error = "detached"
        if entry.timer is not None:
            entry.timer.cancel()
        if entry.pair is not None:
            entry.pair.close("detached")
        self._end_all(entry)

    def _connect(self, entry: Grouped) -> None:
        address = address_of(entry.peer.ticket, self._backend)
        assert address is not None, "only peers that are reached are given to a transport"
        entry.pair = Pair(
            self._loop,
            self._landing,
            entry.peer,
            address,
            self._helpers,
            pool_fd=self._pool_fd,
            backend=self._backend,
            secret=self._secret,
            clock=self._clock,
            timings=self._timings,
            on_change=lambda pair: self._changed(entry, pair),
            on_piece=lambda copy, error: self._moved(entry, copy, error),
        )

    def _lose_patience(self, entry: Grouped) -> None:
        if entry.state is PeerState.JOINING:
            entry.move_to(PeerState.LOST)
            entry.error = f"no process group with the peer after {self._timings.patience_s} s; it may still come"
            self._end_all(entry)

    def _changed(self, entry: Grouped, pair: Pair) -> None:
        if entry.timer is not None:
            entry.timer.cancel()
        if pair.state is PairState.READY:
            entry.move_to(PeerState.READY)
            self._pump(entry)
            return
        if entry.state is not PeerState.DETACHED:
            entry.error = f"no process group with the peer: {pair.error}"
            if entry.state is not PeerState.LOST:
                entry.move_to(PeerState.LOST)
            if pair.state is PairState.CLOSED:
                entry.timer = self._loop.call_at(self._clock() + entry.retry_s, lambda: self._connect(entry))
                entry.retry_s = min(2 * entry.retry_s, _MAX_RETRY_S)
        if pair.state is PairState.CLOSED:
            entry.pair = None
        self._end_all(entry)

    def _pump(self, entry: Grouped) -> None:
        """Order pieces as long as there is room for them, of the copy whose turn it is."""
        pair = entry.pair
        while pair is not None and pair.has_room:
            copies = entry.copies.items()
            unordered = [copy for copy, progress in copies if not progress.ended and not progress.is_ordered]
            if not unordered:
                return
            copy = min(unordered, key=turn)
            if copy.started_at is None:
                copy.started_at = self._clock()
            try:
                pair.take(copy, entry.copies[copy])
            except InjectedFault as fault:
                self._end(entry, copy, str(fault))

    def _moved(self, entry: Grouped, copy: PageCopy, error: str | None) -> None:
        entry.retry_s = self._timings.retry_s
        if error is not None or entry.copies[copy].ended or copy.done_pages == copy.num_pages:
            self._end(entry, copy, error)
        self._pump(entry)

    def _end_all(self, entry: Grouped) -> None:
        for copy in list(entry.copies):
            self._end(entry, copy, entry.error)

    def _end(self, entry: Grouped, copy: PageCopy, error: str | None) -> None:
        """Answer `copy`, if nothing is on its way into its pages any more; else this is called again when it is not."""
        progress = entry.copies[copy]
        if not progress.ended:
            progress.ended, progress.error = True, error
        if entry.pair is not None and entry.pair.drop(copy):
            return
        del entry.copies[copy]
        copy.on_ended(copy, progress.error)
