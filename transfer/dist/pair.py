"""One group with one peer, from the handshake to its end, as the fetching replica sees it. Runs on the fetcher's loop.

States: HANDSHAKE -> JOINING (a helper of ours and one of the peer's meet) -> READY (pieces go), and CLOSED from
anywhere. Closing ends the helper. A piece lands in the helper's memory, and only we copy it into our pages: so a copy
ends at the moment it is asked to, and what was on its way for it is thrown away when it comes.
"""

from __future__ import annotations

import enum
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from transfer.client_handshake import Address, ClientHandshake, Established
from transfer.dist.helpers import Helper, Helpers, make_order
from transfer.dist.orders import BackendName, ChannelError, Failed, Joined, Landed, RunnerOrder, TakePiece
from transfer.dist.slots import Slots
from transfer.faults import InjectedFault
from transfer.io_loop import READ, IoLoop, Timer
from transfer.jobs import PageCopy, Peer
from transfer.landing import Landing, LandingError
from transfer.spans import runs
from transfer.transport import TransferTimings
from transfer.wire import Want
from transfer.wire_requests import pack_runs

_PIECES = 6
"""A copy has at least so many, so that one is put in its place while the next is on its way, but none needs to be
smaller than this: each costs some messages."""
_LEAST_BYTES = 1 << 20


class PairState(enum.Enum):
    HANDSHAKE = enum.auto()
    JOINING = enum.auto()
    READY = enum.auto()
    CLOSED = enum.auto()


_LEGAL = {
    PairState.HANDSHAKE: {PairState.JOINING, PairState.CLOSED},
    PairState.JOINING: {PairState.READY, PairState.CLOSED},
    PairState.READY: {PairState.CLOSED},
    PairState.CLOSED: set[PairState](),
}


@dataclass(kw_only=True, eq=False)
class _Piece:
    """The next `count` pages of a copy, on their way into a slot. Pieces come in the order in which they were asked
    for."""

    job: int
    slot: int
    copy: PageCopy | None
    """None when nobody wants them any more."""
    count: int
    timer: Timer


class Pair:
    """Begins to connect at once. Each state it reaches is told by `on_change`. `on_piece` says whose piece has come
    (None for one that is not wanted any more) and what was wrong with it; there is room for another then. Loop thread
    only."""

    def __init__(
        self,
        loop: IoLoop,
        landing: Landing,
        peer: Peer,
        address: Address,
        helpers: Helpers,
        *,
        backend: BackendName,
        secret: bytes,
        clock: Callable[[], float],
        timings: TransferTimings,
        on_change: Callable[[Pair], None],
        on_piece: Callable[[PageCopy | None, str | None], None],
    ) -> None:
        self.state = PairState.HANDSHAKE
        self.error = ""
        """Why it is closed."""
        self._loop = loop
        self._landing = landing
        self._peer = peer
        self._helpers = helpers
        self._backend: BackendName = backend
        self._clock = clock
        self._timings = timings
        self._on_change = on_change
        self._on_piece = on_piece
        self._order: RunnerOrder | None = None
        self._helper: Helper | None = None
        self._slots: Slots | None = None
        self._pieces: deque[_Piece] = deque()
        self._job = 0
        self._timer: Timer | None = None
        self._handshake = ClientHandshake(
            loop,
            address,
            want=Want.GROUP,
            boot=peer.address.boot,
            secret=secret,
            clock=clock,
            timeout_s=timings.handshake_s,
            on_ready=self._proved,
            on_failed=self.close,
        )
        loop.call_soon(self._begin)

    @property
    def has_room(self) -> bool:
        """Whether `take` may be called."""
        return self._slots is not None and bool(self._slots.free)

    def take(self, copy: PageCopy, first: int) -> int:
        """Order the next piece of `copy`, from its page `first` on; how many pages that is."""
        assert self._helper is not None
        assert self._order is not None
        assert self._slots is not None
        wanted = max(-(-copy.num_pages // _PIECES), _LEAST_BYTES // copy.page_bytes, 1)
        sources = copy.job.source_pages[first : first + min(wanted, self._order.slot_pages)]
        self._job += 1
        job, slot = self._job, self._slots.free.popleft()
        timer = self._loop.call_at(
            self._clock() + self._timings.piece_s,
            lambda: self.close(f"a piece did not come within {self._timings.piece_s} s"),
        )
        self._pieces.append(_Piece(job=job, slot=slot, copy=copy, count=len(sources), timer=timer))
        try:
            self._helper.channel.send(TakePiece(job=job, slot=slot, runs=pack_runs(runs(sources))))
        except ChannelError as error:
            why = str(error)
            self._loop.call_soon(lambda: self.close(why))
        return len(sources)

    def forget(self, copy: PageCopy) -> None:
        """Nothing more is written for `copy`; what is on its way for it is thrown away."""
        for piece in self._pieces:
            if piece.copy is copy:
                piece.copy = None

    def close(self, why: str) -> None:
        """End it, if that has not happened yet. Its copies are the caller's to answer."""
        if self.state is PairState.CLOSED:
            return
        self.error = why
        self._move_to(PairState.CLOSED)
        self._handshake.abandon()
        if self._timer is not None:
            self._timer.cancel()
        for piece in self._pieces:
            piece.timer.cancel()
        self._pieces.clear()
        if self._helper is not None:
            self._loop.forget(self._helper.channel.sock)
            self._helper.kill()
        if self._slots is not None:
            self._slots.close()
            self._slots = None
        self._on_change(self)

    # ---- inner workings -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self.state is PairState.HANDSHAKE:
            self._handshake.start()

    def _proved(self, established: Established) -> None:
        welcome, ticket = established.welcome, self._peer.ticket
        with established.sock as sock:
            if (welcome.num_pages, welcome.page_bytes) != (ticket.num_pages, ticket.page_bytes):
                self.close(f"the peer serves {welcome}, its ticket says {ticket}")
                return
            self._order = make_order(
                "take",
                self._backend,
                key=established.key,
                boot=self._peer.address.boot,
                num_pages=ticket.num_pages,
                page_bytes=ticket.page_bytes,
                timings=self._timings,
            )
            try:
                self._helper = self._helpers.start(self._order, [sock.fileno()])
            except ChannelError as error:
                self.close(str(error))
                return
        self._move_to(PairState.JOINING)
        self._loop.watch(self._helper.channel.sock, READ, self._readable)
        late = f"no process group within {self._timings.join_s} s"
        self._timer = self._loop.call_at(self._clock() + self._timings.join_s, lambda: self.close(late))

    def _readable(self) -> None:
        assert self._helper is not None
        try:
            message, fds = self._helper.channel.receive()
        except BlockingIOError:
            return
        except ChannelError as error:
            self.close(f"our helper process ended: {error}")
            return
        if isinstance(message, Joined) and self.state is PairState.JOINING and len(fds) == 1:
            self._joined(fds[0])
        elif isinstance(message, Landed) and self._pieces and message.job == self._pieces[0].job:
            self._landed(self._pieces.popleft())
        else:
            for fd in fds:
                os.close(fd)
            self.close(message.error if isinstance(message, Failed) else f"our helper process says {message}")

    def _joined(self, fd: int) -> None:
        assert self._order is not None
        try:
            self._slots = Slots(fd, self._order)
        except ValueError as error:
            self.close(str(error))
            return
        if self._timer is not None:
            self._timer.cancel()
        self._move_to(PairState.READY)
        self._on_change(self)

    def _landed(self, piece: _Piece) -> None:
        assert self._slots is not None
        piece.timer.cancel()
        error: str | None = None
        if piece.copy is not None:
            try:
                self._slots.land(piece.slot, piece.copy, piece.count, self._landing, self._backend)
            except (LandingError, InjectedFault) as failure:
                error = str(failure)
        self._slots.free.append(piece.slot)
        self._on_piece(piece.copy, error)

    def _move_to(self, state: PairState) -> None:
        assert state in _LEGAL[self.state], f"a pair cannot go from {self.state} to {state}"
        self.state = state
