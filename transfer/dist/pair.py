"""One group with one peer, from the handshake to its end, as the fetching replica sees it. Runs on the fetcher's loop.

States: HANDSHAKE -> JOINING (a helper of ours and one of the peer's meet) -> READY (pieces go), ENDING from both (our
helper was killed) and CLOSED (it has ended, or there was none).

Our helper writes pieces straight into our pages. So a page that a piece is on its way into must not be given back: not
until the piece has landed, or the helper has ended and the pair is CLOSED. `drop` says for a copy whether there are any
such, and sees to it that the one or the other happens soon.
"""

from __future__ import annotations

import enum
import logging
from collections import deque
from collections.abc import Callable

from transfer.client_handshake import Address, ClientHandshake, Established
from transfer.dist.helpers import Helper, Helpers
from transfer.dist.orders import (
    BackendName,
    ChannelError,
    Failed,
    Joined,
    Landed,
    RunnerOrder,
    TakePiece,
    close_all,
    make_order,
)
from transfer.dist.pieces import Piece, Progress
from transfer.faults import InjectedFault
from transfer.io_loop import READ, IoLoop, Timer
from transfer.jobs import PageCopy, Peer
from transfer.landing import Landing, LandingError
from transfer.transport import TransferTimings
from transfer.wire import Want
from transfer.wire_requests import pack_runs

logger = logging.getLogger(__name__)

_MAX_PIECES = 3
"""On their way at a time: while one is sent another waits at the giver, and a third is ordered."""


class PairState(enum.Enum):
    HANDSHAKE = enum.auto()
    JOINING = enum.auto()
    READY = enum.auto()
    ENDING = enum.auto()
    CLOSED = enum.auto()


_LEGAL = {
    PairState.HANDSHAKE: {PairState.JOINING, PairState.CLOSED},
    PairState.JOINING: {PairState.READY, PairState.ENDING},
    PairState.READY: {PairState.ENDING},
    PairState.ENDING: {PairState.CLOSED},
    PairState.CLOSED: set[PairState](),
}


class Pair:
    """Begins to connect at once. That it is READY, ENDING or CLOSED is told by `on_change`. `on_piece` says whose piece
    has landed and what was wrong with it; there is room for another then. Loop thread only."""

    def __init__(
        self,
        loop: IoLoop,
        landing: Landing,
        peer: Peer,
        address: Address,
        helpers: Helpers,
        *,
        pool_fd: int,
        backend: BackendName,
        secret: bytes,
        clock: Callable[[], float],
        timings: TransferTimings,
        on_change: Callable[[Pair], None],
        on_piece: Callable[[PageCopy, str | None], None],
    ) -> None:
        self.state = PairState.HANDSHAKE
        self.error = ""
        """Why it has ended."""
        self._loop = loop
        self._landing = landing
        self._peer = peer
        self._helpers = helpers
        self._pool_fd = pool_fd
        self._backend: BackendName = backend
        self._clock = clock
        self._timings = timings
        self._on_change = on_change
        self._on_piece = on_piece
        self._order: RunnerOrder | None = None
        self._helper: Helper | None = None
        self._pieces: deque[Piece] = deque()  # in the order in which they land
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
        return self.state is PairState.READY and len(self._pieces) < _MAX_PIECES

    def take(self, copy: PageCopy, progress: Progress) -> None:
        """Order the next piece of `copy`. Raises `InjectedFault` when a test says so."""
        assert self._helper is not None
        assert self._order is not None
        self._landing.before(copy, self._backend)
        sources, targets = progress.order(at_most=self._order.piece_pages)
        self._job += 1
        timer = self._overdue(self._timings.piece_s, "a piece did not come")
        self._pieces.append(Piece(job=self._job, copy=copy, count=int(targets[:, 1].sum()), timer=timer))
        try:
            self._helper.channel.send(
                TakePiece(
                    job=self._job,
                    sources=pack_runs(sources),
                    targets=pack_runs(targets),
                    read_soon=bool(copy.job.checksums),
                )
            )
        except ChannelError as error:
            why = str(error)
            self._loop.call_soon(lambda: self.close(why))

    def drop(self, copy: PageCopy) -> bool:
        """Nothing more is wanted of `copy`. Whether something is on its way into its pages all the same: `on_piece`
        tells when it has landed, and if that takes too long the pair ends."""
        pieces = [piece for piece in self._pieces if piece.copy is copy]
        for piece in pieces:
            if piece.wanted and self.state is PairState.READY:
                piece.timer.cancel()
                piece.timer = self._overdue(self._timings.drain_s, "what was on its way for an ended copy did not come")
            piece.wanted = False
        return bool(pieces)

    def close(self, why: str) -> None:
        """End it, if that has not begun yet."""
        if self.state in (PairState.ENDING, PairState.CLOSED):
            return
        self.error = why
        self._handshake.abandon()
        if self._timer is not None:
            self._timer.cancel()
        for piece in self._pieces:
            piece.timer.cancel()
        if self._helper is None:
            self._move_to(PairState.CLOSED)
        else:
            self._move_to(PairState.ENDING)
            self._helpers.end(self._helper, self._fenced)
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
                num_pages=self._landing.view.nbytes // ticket.page_bytes,
                page_bytes=ticket.page_bytes,
                timings=self._timings,
            )
            try:
                self._helper = self._helpers.start(self._order, [sock.fileno(), self._pool_fd])
            except ChannelError as error:
                self.close(str(error))
                return
        self._move_to(PairState.JOINING)
        self._loop.watch(self._helper.channel.sock, READ, self._readable)
        self._timer = self._overdue(self._timings.join_s, "no process group")

    def _readable(self) -> None:
        assert self._helper is not None
        try:
            message, fds = self._helper.channel.receive()
        except BlockingIOError:
            return
        except ChannelError as error:
            self.close(f"our helper process ended: {error}")
            return
        close_all(fds)
        if isinstance(message, Joined) and self.state is PairState.JOINING:
            self._joined()
        elif isinstance(message, Landed) and self._pieces and message.job == self._pieces[0].job:
            self._landed(self._pieces.popleft())
        else:
            self.close(message.error if isinstance(message, Failed) else f"our helper process says {message}")

    def _joined(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._move_to(PairState.READY)
        self._on_change(self)

    def _landed(self, piece: Piece) -> None:
        piece.timer.cancel()
        error: str | None = None
        if piece.wanted:
            try:
                self._landing.landed(piece.copy, self._backend, piece.count)
            except (LandingError, InjectedFault) as failure:
                error = str(failure)
            except Exception as failure:  # a bug; the copy must be answered all the same
                logger.exception("verifying pages failed")
                error = f"verifying pages failed: {failure!r}"
        self._on_piece(piece.copy, error)

    def _fenced(self) -> None:
        """Our helper has ended: nothing is on its way any more."""
        self._pieces.clear()
        self._move_to(PairState.CLOSED)
        self._on_change(self)

    def _overdue(self, seconds: float, what: str) -> Timer:
        return self._loop.call_at(self._clock() + seconds, lambda: self.close(f"{what} within {seconds} s"))

    def _move_to(self, state: PairState) -> None:
        assert state in _LEGAL[self.state], f"a pair cannot go from {self.state} to {state}"
        self.state = state
