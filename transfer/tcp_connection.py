"""One connection to a peer's page server: a handshake, then one copy after the other. Runs on the fetcher's `IoLoop`.

States: HANDSHAKE -> IDLE -> REPLY (asked, waits for the header) -> PAYLOAD -> IDLE ..., and CLOSED from anywhere. The
payload is received straight into the target pages and verified as they complete, while they are still in the cache. The
only way to end a copy early is to close the connection: what is still on its way then lands nowhere. So ends one that
brings nothing any more, because its peer hangs or its packets go nowhere.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import socket
from collections.abc import Callable

from transfer.client_handshake import ClientHandshake, Established
from transfer.faults import InjectedFault
from transfer.io_loop import READ, WRITE, IoLoop
from transfer.jobs import PageCopy, Peer
from transfer.landing import Landing, LandingError
from transfer.stall_watch import StallWatch
from transfer.tcp_payload import Payload, bytes_on_the_way, encode_copy, payload_of, want_of
from transfer.transport import TransferTimings
from transfer.wire import Status, WireError
from transfer.wire_requests import REPLY_BYTES, decode_reply

logger = logging.getLogger(__name__)

_CALL_BYTES = 1 << 20
"""Taken from the socket at a time, so that what landed is verified from the cache."""
_TURN_BYTES = 4 << 20
"""Then the other connections have their turn."""


class ConnectionState(enum.Enum):
    HANDSHAKE = enum.auto()
    IDLE = enum.auto()
    REPLY = enum.auto()
    PAYLOAD = enum.auto()
    CLOSED = enum.auto()


_LEGAL = {
    ConnectionState.HANDSHAKE: {ConnectionState.IDLE, ConnectionState.CLOSED},
    ConnectionState.IDLE: {ConnectionState.REPLY, ConnectionState.CLOSED},
    ConnectionState.REPLY: {ConnectionState.PAYLOAD, ConnectionState.IDLE, ConnectionState.CLOSED},
    ConnectionState.PAYLOAD: {ConnectionState.IDLE, ConnectionState.CLOSED},
    ConnectionState.CLOSED: set[ConnectionState](),
}


class PageConnection:
    """Begins to connect at once. Each state it reaches is told by `on_change`; loop thread only.

    A copy that ends, well or not, is told by `on_copy_ended` before the state that follows it is.
    """

    def __init__(
        self,
        loop: IoLoop,
        landing: Landing,
        peer: Peer,
        *,
        transport: str,
        secret: bytes,
        clock: Callable[[], float],
        timings: TransferTimings,
        on_change: Callable[[PageConnection], None],
        on_copy_ended: Callable[[PageConnection, PageCopy, str | None], None],
    ) -> None:
        self.state = ConnectionState.HANDSHAKE
        self.error = ""
        """Why it is closed."""
        self.copy: PageCopy | None = None
        """The copy that it is busy with."""
        self.copies = 0
        """Copies begun on it."""
        self._loop = loop
        self._landing = landing
        self._peer = peer
        self._transport = transport
        self._clock = clock
        self._silence_s = timings.silence_s
        self._on_change = on_change
        self._on_copy_ended = on_copy_ended
        self._sock: socket.socket | None = None
        self._key = b""
        self._unsent = memoryview(b"")
        self._received = bytearray()
        self._payload: Payload | None = None
        self._watch: StallWatch | None = None
        self._handshake = ClientHandshake(
            loop,
            (peer.ticket.tcp_host, peer.ticket.tcp_port),
            want=want_of(peer),
            boot=peer.address.boot,
            secret=secret,
            clock=clock,
            timeout_s=timings.handshake_s,
            on_ready=self._ready,
            on_failed=self.close,
        )
        loop.call_soon(self._begin)

    def run(self, copy: PageCopy) -> None:
        """Begin `copy`; only while IDLE."""
        assert self._sock is not None
        self.copy = copy
        self.copies += 1
        copy.started_at = self._clock()
        self._move_to(ConnectionState.REPLY)
        self._unsent = memoryview(encode_copy(self._key, copy, job=self.copies))
        self._watch = StallWatch(
            self._loop,
            clock=self._clock,
            seconds=self._silence_s,
            on_stall=lambda: self.close(f"the peer sent no byte for {self._silence_s} s"),
        )
        try:
            self._send()
        except OSError as error:
            self.close(str(error))

    def close(self, why: str) -> None:
        """End it, and the copy that it is busy with, if that has not happened yet."""
        if self.state is ConnectionState.CLOSED:
            return
        self.error = why
        self._move_to(ConnectionState.CLOSED)
        self._handshake.abandon()
        if self._sock is not None:
            self._loop.forget(self._sock)
            self._sock.close()
            self._sock = None
        self._end_copy(why)
        self._on_change(self)

    # ---- inner workings -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self.state is ConnectionState.HANDSHAKE:
            self._handshake.start()

    def _ready(self, established: Established) -> None:
        self._sock, self._key = established.sock, established.key
        welcome, ticket = established.welcome, self._peer.ticket
        if (welcome.num_pages, welcome.page_bytes) != (ticket.num_pages, ticket.page_bytes):
            self.close(f"the peer serves {welcome}, its ticket says {ticket}")
            return
        self._become_idle()

    def _become_idle(self) -> None:
        assert self._sock is not None
        self._move_to(ConnectionState.IDLE)
        self._loop.watch(self._sock, READ, self._ready_for_io)
        self._on_change(self)

    def _ready_for_io(self) -> None:
        try:
            if self._unsent:
                self._send()
            if self.state is ConnectionState.PAYLOAD:
                self._receive_payload()
            else:
                self._receive_reply()
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, WireError, LandingError, InjectedFault) as error:
            self.close(str(error))
        except Exception as error:  # a bug: nothing more is received, or what was not verified would be taken for good
            logger.exception("receiving pages failed")
            self.close(f"receiving pages failed: {error!r}")

    def _send(self) -> None:
        assert self._sock is not None
        with contextlib.suppress(BlockingIOError, InterruptedError):
            self._unsent = self._unsent[self._sock.send(self._unsent, socket.MSG_NOSIGNAL) :]
        self._loop.watch(self._sock, READ | WRITE if self._unsent else READ, self._ready_for_io)

    def _receive_reply(self) -> None:
        assert self._sock is not None
        data = self._sock.recv(REPLY_BYTES - len(self._received))
        if not data:
            raise WireError("the peer closed the connection")
        if self.copy is None or self._watch is None:
            raise WireError("the peer sent bytes that nobody asked for")
        self._watch.moved()
        self._received += data
        if len(self._received) < REPLY_BYTES:
            return
        reply = decode_reply(self._key, bytes(self._received))
        self._received.clear()
        copy = self.copy
        if reply.job != self.copies or reply.boot != self._peer.address.boot:
            raise WireError(f"a reply to request {reply.job} of boot {reply.boot}, not to this one")
        if reply.status is not Status.OK:
            self._end_copy(f"the peer refuses: {reply.status.name}")
            self._become_idle()
            return
        expected = bytes_on_the_way(copy)
        if (reply.num_pages, reply.byte_length) != (copy.num_pages, expected):
            raise WireError(f"the peer wants to send {reply.byte_length} bytes instead of {expected}")
        self._payload = payload_of(
            self._landing,
            copy,
            transport=self._transport,
            call_bytes=_CALL_BYTES,
            key=self._key,
            job=self.copies,
        )
        self._move_to(ConnectionState.PAYLOAD)
        self._receive_payload()

    def _receive_payload(self) -> None:
        assert self._sock is not None
        assert self.copy is not None
        assert self._payload is not None
        assert self._watch is not None
        copy, payload = self.copy, self._payload
        budget, more = _TURN_BYTES, True
        while payload.left and budget > 0 and more:
            self._landing.before(copy, self._transport)
            count = payload.receive(self._sock)
            if count == 0:
                raise WireError("the peer closed the connection in the middle of a page")
            budget -= count
            self._watch.moved()
            more = count >= _CALL_BYTES  # less was all that was there
        if not payload.left:
            self._end_copy(None)
            self._become_idle()

    def _end_copy(self, error: str | None) -> None:
        copy, self.copy = self.copy, None
        self._unsent = memoryview(b"")
        if self._payload is not None:
            self._payload.drop()
            self._payload = None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if copy is not None:
            self._on_copy_ended(self, copy, error)

    def _move_to(self, state: ConnectionState) -> None:
        assert state in _LEGAL[self.state], f"a page connection cannot go from {self.state} to {state}"
        self.state = state
