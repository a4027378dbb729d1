"""One accepted connection of a page server, from the greeting to its end. Runs on the server's `IoLoop`.

States: HELLO (greeted, waits for proof) -> REQUEST -> RUNS -> SENDING -> REQUEST ..., and CLOSED from anywhere.
Whatever does not follow `wire.py` closes the connection; before its proof a connection can cost no more than the bytes
of one hello.
"""

from __future__ import annotations

import enum
import logging
import socket
from collections.abc import Callable

from protocol.handshake import new_nonce
from transfer.io_loop import READ, IoLoop
from transfer.sending import AnswerSender
from transfer.served import ServedRegion, asked
from transfer.transport import TransferTimings
from transfer.wire import (
    HELLO_BYTES,
    Status,
    Want,
    Welcome,
    WireError,
    connection_key,
    decode_hello,
    encode_greeting,
    encode_welcome,
)
from transfer.wire_grains import body_bytes
from transfer.wire_requests import REQUEST_BYTES, Reply, RequestHead, decode_request_head, encode_reply

logger = logging.getLogger(__name__)

_CALL_BYTES = 512 << 10
"""Offered to the socket at a time. Its lock is held meanwhile, and the receiver's acknowledgements wait for it: on a
quiet machine a plain stream sent in pieces of 256 KB went at 5.3 GB/s, of 1 MB at 4.5, all at once at 3.6. A busy
machine would rather have fewer calls."""


class _State(enum.Enum):
    HELLO = enum.auto()
    REQUEST = enum.auto()
    RUNS = enum.auto()
    SENDING = enum.auto()
    CLOSED = enum.auto()


_LEGAL = {
    _State.HELLO: {_State.REQUEST, _State.CLOSED},
    _State.REQUEST: {_State.RUNS, _State.CLOSED},
    _State.RUNS: {_State.SENDING, _State.CLOSED},
    _State.SENDING: {_State.REQUEST, _State.CLOSED},
    _State.CLOSED: set[_State](),
}


class ServerConnection:
    """Takes `sock` over. `on_proved` comes when the peer has shown that it knows the secret, `on_closed` at the end;
    each at most once."""

    def __init__(
        self,
        loop: IoLoop,
        sock: socket.socket,
        region: ServedRegion,
        *,
        serves: Want,
        clock: Callable[[], float],
        timings: TransferTimings,
        on_proved: Callable[[ServerConnection], None],
        on_closed: Callable[[ServerConnection], None],
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._region = region
        self._serves = serves
        self._want = serves
        self._clock = clock
        self._timings = timings
        self._on_proved = on_proved
        self._on_closed = on_closed
        self._state = _State.HELLO
        self._nonce = new_nonce()
        self._key = b""
        self._received = bytearray()
        self._wanted = HELLO_BYTES
        self._head: RequestHead | None = None
        self._last_job = 0
        self._sender: AnswerSender | None = None
        self._timer = loop.call_at(clock() + timings.handshake_s, self._handshake_late)

    def start(self) -> None:
        """Greet, and wait for the answer."""
        try:
            self._send_small(encode_greeting(self._nonce))
        except OSError as error:
            self.close(str(error))
            return
        self._loop.watch(self._sock, READ, self._readable)

    def close(self, why: str) -> None:
        """End it, if that has not happened yet."""
        if self._state is _State.CLOSED:
            return
        logger.debug("page connection closed: %s", why)
        self._move_to(_State.CLOSED)
        self._timer.cancel()
        self._loop.forget(self._sock)
        self._sock.close()
        if self._sender is not None:
            self._sender.stop()
            self._sender = None
        self._on_closed(self)

    def hand_over(self) -> tuple[socket.socket, bytes]:
        """Give the proved connection's socket and key to the caller, who closes the socket; here it is over."""
        assert self._state is _State.REQUEST, f"a page connection is handed over in {self._state}"
        self._move_to(_State.CLOSED)
        self._loop.forget(self._sock)
        self._on_closed(self)
        return self._sock, self._key

    # ---- receiving ----------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            data = self._sock.recv(self._wanted - len(self._received))
            if not data:
                self.close("closed by the peer")
                return
            self._received += data
            if len(self._received) < self._wanted:
                return
            message = bytes(self._received)
            self._received.clear()
            if self._state is _State.HELLO:
                self._hello(message)
            elif self._state is _State.REQUEST:
                self._request(message)
                self._readable()  # its runs have most likely come along
            else:
                self._runs(message)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, WireError) as error:
            self.close(str(error))

    def _hello(self, message: bytes) -> None:
        region = self._region
        hello = decode_hello(message, region.secret, self._nonce)
        if hello.want not in region.serves(self._serves):
            raise WireError(f"this socket does not serve {hello.want.name}")
        self._want = hello.want
        self._timer.cancel()
        status = Status.OK if hello.boot == region.boot else Status.OTHER_BOOT
        welcome = Welcome(status=status, boot=region.boot, num_pages=region.num_pages, page_bytes=region.page_bytes)
        answer = encode_welcome(region.secret, self._nonce, hello.nonce, welcome)
        if status is Status.OK and self._serves is Want.MEMORY:
            socket.send_fds(self._sock, [answer], [region.fd])
        else:
            self._send_small(answer)
        if status is not Status.OK or self._serves is Want.MEMORY:
            self.close("answered")
            return
        self._key = connection_key(region.secret, self._nonce, hello.nonce)
        self._await_request()
        self._on_proved(self)

    def _await_request(self) -> None:
        self._move_to(_State.REQUEST)
        self._wanted = REQUEST_BYTES
        self._loop.watch(self._sock, READ, self._readable)

    def _request(self, message: bytes) -> None:
        head = decode_request_head(message)
        if head.boot != self._region.boot or head.job <= self._last_job:
            raise WireError(f"request {head.job} to boot {head.boot}: not the next one of this connection")
        most = self._region.most(self._want)
        if not 0 < head.num_runs <= most or (self._want is Want.INT8 and not 0 < head.num_pages <= most):
            raise WireError(
                f"a request of {head.num_runs} runs and {head.num_pages} pages, of a pool of "
                f"{self._region.num_pages} pages"
            )
        self._head = head
        self._last_job = head.job
        self._move_to(_State.RUNS)
        self._wanted = body_bytes(self._want, head)

    def _runs(self, message: bytes) -> None:
        assert self._head is not None
        head, region = self._head, self._region
        found = asked(region, self._want, head, message, key=self._key, call_bytes=_CALL_BYTES)
        reply = Reply(
            status=Status.BAD_PAGES if found is None else Status.OK,
            boot=region.boot,
            job=head.job,
            num_pages=0 if found is None else head.num_pages,
            byte_length=0 if found is None else found.left,
        )
        self._move_to(_State.SENDING)
        self._sender = AnswerSender(
            self._loop,
            self._sock,
            reply=encode_reply(self._key, reply),
            payload=found,
            clock=self._clock,
            stall_s=self._timings.stall_s,
            on_sent=self._sent,
            on_failed=self.close,
        )
        self._sender.start()

    def _sent(self) -> None:
        self._sender = None
        self._await_request()

    # ---- small matters ------------------------------------------------------------------------------------

    def _send_small(self, message: bytes) -> None:
        if self._sock.send(message, socket.MSG_NOSIGNAL) != len(message):  # the buffer is empty, so it fits
            raise OSError("the peer takes no bytes")

    def _handshake_late(self) -> None:
        self.close(f"no handshake within {self._timings.handshake_s} s")

    def _move_to(self, state: _State) -> None:
        assert state in _LEGAL[self._state], f"a page connection cannot go from {self._state} to {state}"
        self._state = state
