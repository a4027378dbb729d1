"""The fetcher's side of making a connection: connect, prove the secret, hear the peer's proof. Runs on an `IoLoop`.

The same steps for both kinds of connection (`wire.py`): over TCP the authenticated socket is kept for requests, over
the Unix socket the memory's file descriptor arrives with the welcome and the socket has done its work.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from protocol.handshake import new_nonce
from transfer.io_loop import READ, WRITE, IoLoop
from transfer.wire import (
    GREETING_BYTES,
    WELCOME_BYTES,
    Status,
    Want,
    Welcome,
    WireError,
    connection_key,
    decode_greeting,
    decode_welcome,
    encode_hello,
)

Address = str | tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Established:
    """A finished handshake. Who gets it owns the socket and the descriptors."""

    sock: socket.socket
    key: bytes
    welcome: Welcome
    fds: list[int]


def unix_address(name: str) -> Address:
    """The abstract Unix socket of a ticket's `shm_socket`."""
    return "\0" + name


def open_socket(address: Address) -> socket.socket:
    """A non-blocking socket of the family that `address` needs; raises `OSError` for a host that is not a numeric
    address."""
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    else:
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    return sock


class ClientHandshake:
    """One attempt. Ends with exactly one of `on_ready` and `on_failed`, unless it is abandoned; then it knows neither
    any more, for whoever is told mostly holds it. Loop thread only."""

    def __init__(
        self,
        loop: IoLoop,
        address: Address,
        *,
        want: Want,
        boot: int,
        secret: bytes,
        clock: Callable[[], float],
        timeout_s: float,
        on_ready: Callable[[Established], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._address = address
        self._want = want
        self._boot = boot
        self._secret = secret
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._nonce = new_nonce()
        self._server_nonce = b""
        self._received = bytearray()
        self._fds: list[int] = []
        self._sock: socket.socket | None = None
        self._timer = loop.call_at(clock() + timeout_s, lambda: self._fail(f"no handshake within {timeout_s} s"))

    def start(self) -> None:
        """Begin to connect; may already fail here."""
        try:
            self._sock = open_socket(self._address)
            code = self._sock.connect_ex(self._address)
            if code not in (0, errno.EINPROGRESS):
                raise OSError(code, os.strerror(code))
        except OSError as error:
            self._fail(f"cannot connect: {error}")
            return
        self._loop.watch(self._sock, WRITE, self._connected)

    def abandon(self) -> None:
        """Close everything; neither callback will come."""
        self._timer.cancel()
        if self._sock is not None:
            self._loop.forget(self._sock)
            self._sock.close()
            self._sock = None
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._on_ready = self._on_failed = _nobody

    def _connected(self) -> None:
        assert self._sock is not None
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(f"cannot connect: {os.strerror(code)}")
            return
        self._loop.watch(self._sock, READ, self._readable)

    def _readable(self) -> None:
        assert self._sock is not None
        wanted = WELCOME_BYTES if self._server_nonce else GREETING_BYTES
        try:
            data = self._receive(wanted - len(self._received))
            if not data:
                raise WireError("the peer closed the connection during the handshake (another cluster secret?)")
            self._received += data
            if len(self._received) < wanted:
                return
            message = bytes(self._received)
            self._received.clear()
            if not self._server_nonce:
                self._greeted(message)
                return
            established = self._welcomed(message)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, WireError) as error:
            self._fail(str(error))
            return
        on_ready = self._on_ready
        self._on_ready = self._on_failed = _nobody
        on_ready(established)

    def _receive(self, limit: int) -> bytes:
        assert self._sock is not None
        if self._want is not Want.MEMORY:
            return self._sock.recv(limit)
        data, fds, _, _ = socket.recv_fds(self._sock, limit, 1, socket.MSG_CMSG_CLOEXEC)
        self._fds += fds
        return data

    def _greeted(self, message: bytes) -> None:
        assert self._sock is not None
        self._server_nonce = decode_greeting(message)
        hello = encode_hello(self._secret, self._server_nonce, want=self._want, boot=self._boot, nonce=self._nonce)
        if self._sock.send(hello) != len(hello):  # the buffer of a fresh connection is empty
            raise WireError("the peer takes no bytes")

    def _welcomed(self, message: bytes) -> Established:
        welcome = decode_welcome(message, self._secret, self._server_nonce, self._nonce)
        if welcome.status is not Status.OK or welcome.boot != self._boot:
            raise WireError(f"the peer is boot {welcome.boot} now, boot {self._boot} was meant")
        if self._want is Want.MEMORY and len(self._fds) != 1:
            raise WireError("the peer's welcome came without its memory")
        assert self._sock is not None
        self._loop.forget(self._sock)
        self._timer.cancel()
        key = connection_key(self._secret, self._server_nonce, self._nonce)
        established = Established(sock=self._sock, key=key, welcome=welcome, fds=self._fds)
        self._sock, self._fds = None, []
        return established

    def _fail(self, why: str) -> None:
        on_failed = self._on_failed
        self.abandon()
        on_failed(why)


def _nobody(outcome: object) -> None:
    """Is told how an attempt ended that is over already."""
