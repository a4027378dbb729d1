"""Transport through process groups: one helper process per peer, which takes part in the group so that we need not.

A peer's life here: JOINING (its first group is being made; copies wait) -> READY (copies run, piece by piece, the one
with the least to do first) -> DETACHED. When the first group is long in coming, or a group cannot be made or ends, the
peer is LOST: its copies are answered at once, so that they can go another way, while a group is tried in the
background, less and less often until one has moved something.
"""

from __future__ import annotations

import enum
import ipaddress
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.handshake import RegionTicket
from transfer.dist.helpers import Helpers
from transfer.dist.orders import BackendName
from transfer.dist.pair import Pair, PairState
from transfer.io_loop import IoLoop, Timer
from transfer.jobs import PageCopy, Peer
from transfer.landing import Landing
from transfer.transport import TransferTimings, turn

_MAX_RETRY_S = 60.0


class _State(enum.Enum):
    JOINING = enum.auto()
    READY = enum.auto()
    LOST = enum.auto()
    DETACHED = enum.auto()


_LEGAL = {
    _State.JOINING: {_State.READY, _State.LOST, _State.DETACHED},
    _State.READY: {_State.LOST, _State.DETACHED},
    _State.LOST: {_State.READY, _State.DETACHED},
    _State.DETACHED: set[_State](),
}


@dataclass(kw_only=True, eq=False)
class _Grouped:
    """A peer as this transport knows it."""

    peer: Peer
    retry_s: float
    """From the loss of the next group to the attempt after it."""
    state: _State = _State.JOINING
    pair: Pair | None = None
    """The group that is, or is being made."""
    copies: dict[PageCopy, int] = field(default_factory=dict)
    """Those not answered yet, and how many of their pages have been ordered."""
    timer: Timer | None = None
    """To the end of our patience, or to the next attempt."""
    error: str = ""

    def move_to(self, state: _State) -> None:
        assert state in _LEGAL[self.state], f"a peer cannot go from {self.state} to {state}"
        self.state = state


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
        self._backend: BackendName = backend
        self._loop = loop
        self._landing = landing
        self._secret = secret
        self._clock = clock
        self._timings = timings
        self._peers: dict[Peer, _Grouped] = {}
        self._helpers = Helpers()

    @property
    def name(self) -> str:
        return self._backend

    def reaches(self, ticket: RegionTicket) -> bool:
        return _address(ticket, self._backend) is not None

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
            entry = self._peers[peer] = _Grouped(peer=peer, retry_s=self._timings.retry_s)
            late = self._clock() + self._timings.patience_s
            entry.timer = self._loop.call_at(late, lambda: self._lose_patience(entry))
            self._connect(entry)

    def _start(self, copy: PageCopy) -> None:
        if copy.stop_requested:
            copy.on_ended(copy, "stopped")
            return
        self._attach(copy.peer)
        entry = self._peers[copy.peer]
        if entry.state is _State.LOST:
            copy.on_ended(copy, entry.error)
            return
        entry.copies[copy] = 0
        self._pump(entry)

    def _stop(self, copy: PageCopy) -> None:
        entry = self._peers.get(copy.peer)
        if entry is not None and copy in entry.copies:
            self._end(entry, copy, "stopped")

    def _detach(self, peer: Peer) -> None:
        entry = self._peers.pop(peer, None)
        if entry is None:
            return
        entry.move_to(_State.DETACHED)
        if entry.timer is not None:
            entry.timer.cancel()
        if entry.pair is not None:
            entry.pair.close("detached")
        self._end_all(entry, "detached")

    def _connect(self, entry: _Grouped) -> None:
        address = _address(entry.peer.ticket, self._backend)
        assert address is not None, "only peers that are reached are given to a transport"
        entry.pair = Pair(
            self._loop,
            self._landing,
            entry.peer,
            address,
            self._helpers,
            backend=self._backend,
            secret=self._secret,
            clock=self._clock,
            timings=self._timings,
            on_change=lambda pair: self._changed(entry, pair),
            on_piece=lambda copy, error: self._moved(entry, copy, error),
        )

    def _lose_patience(self, entry: _Grouped) -> None:
        if entry.state is _State.JOINING:
            entry.move_to(_State.LOST)
            entry.error = f"no process group with the peer after {self._timings.patience_s} s; it may still come"
            self._end_all(entry, entry.error)

    def _changed(self, entry: _Grouped, pair: Pair) -> None:
        if entry.state is _State.DETACHED:
            return
        if entry.timer is not None:
            entry.timer.cancel()
        if pair.state is PairState.READY:
            entry.move_to(_State.READY)
            self._pump(entry)
        elif pair.state is PairState.CLOSED:
            entry.error = f"no process group with the peer: {pair.error}"
            if entry.state is not _State.LOST:
                entry.move_to(_State.LOST)
            entry.timer = self._loop.call_at(self._clock() + entry.retry_s, lambda: self._connect(entry))
            entry.retry_s = min(2 * entry.retry_s, _MAX_RETRY_S)
            self._end_all(entry, entry.error)

    def _pump(self, entry: _Grouped) -> None:
        """Order pieces as long as there is room for them, of the copy whose turn it is."""
        pair = entry.pair
        while pair is not None and pair.has_room:
            unordered = [copy for copy, ordered in entry.copies.items() if ordered < copy.num_pages]
            if not unordered:
                return
            copy = min(unordered, key=turn)
            if copy.started_at is None:
                copy.started_at = self._clock()
            entry.copies[copy] += pair.take(copy, entry.copies[copy])

    def _moved(self, entry: _Grouped, copy: PageCopy | None, error: str | None) -> None:
        entry.retry_s = self._timings.retry_s
        if copy is not None and (error is not None or copy.done_pages == copy.num_pages):
            self._end(entry, copy, error)
        self._pump(entry)

    def _end_all(self, entry: _Grouped, error: str) -> None:
        for copy in list(entry.copies):
            self._end(entry, copy, error)

    def _end(self, entry: _Grouped, copy: PageCopy, error: str | None) -> None:
        del entry.copies[copy]
        if entry.pair is not None:
            entry.pair.forget(copy)
        copy.on_ended(copy, error)


def _address(ticket: RegionTicket, backend: str) -> tuple[str, int] | None:
    """Where the peer's door is; None when there is none, or what is said of it makes no sense."""
    host, _, port = ticket.doors.get(backend, "").rpartition(":")
    try:
        numeric = str(ipaddress.ip_address(host))
    except ValueError:
        return None
    return (numeric, int(port)) if port.isascii() and port.isdigit() and 0 < int(port) < 2**16 else None
