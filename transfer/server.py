"""Serves one KV pool to receivers: its memory to those on this host, its pages over TCP to the others.

Lifecycle: `PageServer(...)` listens at once, on an abstract Unix socket and on a TCP port of its own choice;
`ticket()` says where, for the replica's welcome to its peers; `close()` ends every connection. One thread does it all
and never blocks, so a receiver that hangs, floods or talks nonsense costs the others nothing: connections without
proof are bounded in number (the oldest goes first), in bytes and in time. Receivers only read: nothing here can change
a page.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable, Sequence

from protocol.handshake import RegionTicket
from transfer.door import Door
from transfer.io_loop import READ, IoLoop
from transfer.memory import SharedMemory, host_id
from transfer.serving import ServedRegion, ServerConnection
from transfer.transport import TransferTimings
from transfer.wire import Want

logger = logging.getLogger(__name__)

_MAX_UNPROVED = 64
_MAX_CONNECTIONS = 1024
_ACCEPT_PAUSE_S = 0.5


class PageServer:
    """Serves the first `num_pages` pages of `page_bytes` bytes in `memory`, which must outlive the server.

    `layout` is the pool's fingerprint and `boot` this life of the replica (an unsigned 64-bit number). `host` is the
    address or name that peers reach this machine by, `bind_host` the one to listen on when that differs; the port is
    chosen by the system. The ticket also names `doors`, which stay their owner's. Raises `ValueError` for a region
    larger than its memory, an empty secret or a `host` that is no single machine's, and `OSError` when a host is
    unknown or cannot be listened on.
    """

    def __init__(
        self,
        *,
        memory: SharedMemory,
        page_bytes: int,
        num_pages: int,
        layout: str,
        host: str,
        boot: int,
        secret: bytes,
        bind_host: str | None = None,
        doors: Sequence[Door] = (),
        clock: Callable[[], float] = time.monotonic,
        timings: TransferTimings | None = None,
    ) -> None:
        if page_bytes <= 0 or not 0 < num_pages < 2**32 or page_bytes * num_pages > memory.nbytes:
            raise ValueError(f"{num_pages} pages of {page_bytes} bytes do not fit a memory of {memory.nbytes} bytes")
        if host in ("", "0.0.0.0", "::"):
            raise ValueError(f"host {host!r} means every address; say the one that peers reach this machine by")
        if not secret:
            raise ValueError("the cluster secret is empty; pages are only served to those who know one")
        if not 0 <= boot < 2**64:
            raise ValueError(f"boot {boot} is not an unsigned 64-bit number")
        self._region = ServedRegion(
            view=memory.view, fd=memory.fd, page_bytes=page_bytes, num_pages=num_pages, boot=boot, secret=secret
        )
        self._clock = clock
        self._timings = timings or TransferTimings()
        self._unproved: dict[ServerConnection, None] = {}  # oldest first
        self._proved: set[ServerConnection] = set()
        tcp_host = _resolve(host)
        self._tcp = _listen_tcp(_resolve(bind_host or host))
        shm_socket = f"pd-serve-{secrets.token_hex(12)}"
        self._unix = _listen_unix(shm_socket)
        self._ticket = RegionTicket(
            num_pages=num_pages,
            page_bytes=page_bytes,
            layout=layout,
            host_id=host_id(),
            shm_socket=shm_socket,
            tcp_host=tcp_host,
            tcp_port=self._tcp.getsockname()[1],
            doors={door.name: door.address() for door in doors},
        )
        self._closed = False
        self._loop = IoLoop(name="page-server", clock=clock)
        self._loop.call_soon(self._watch_listeners)

    def ticket(self) -> RegionTicket:
        """How peers reach this pool."""
        return self._ticket

    @property
    def num_connections(self) -> int:
        """Connections open now, proved or not."""
        return len(self._unproved) + len(self._proved)

    def close(self) -> None:
        """Stop listening and drop every connection. Raises `TimeoutError` when the thread does not end."""
        if self._closed:
            return
        self._closed = True
        self._loop.call_soon(self._shut)
        self._loop.close(timeout_s=self._timings.close_s)

    # ---- in the loop's thread -----------------------------------------------------------------------------

    def _watch_listeners(self) -> None:
        if self._closed:
            return
        self._loop.watch(self._tcp, READ, lambda: self._accept(self._tcp, Want.PAGES))
        self._loop.watch(self._unix, READ, lambda: self._accept(self._unix, Want.MEMORY))

    def _shut(self) -> None:
        for listener in (self._tcp, self._unix):
            self._loop.forget(listener)
            listener.close()
        for connection in [*self._unproved, *self._proved]:
            connection.close("the server closes")

    def _accept(self, listener: socket.socket, serves: Want) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors: look again when some may be free
            logger.warning("cannot accept a page connection: %s", error)
            self._loop.forget(self._tcp)
            self._loop.forget(self._unix)
            self._loop.call_at(self._clock() + _ACCEPT_PAUSE_S, self._watch_listeners)
            return
        sock.setblocking(False)
        if serves is Want.PAGES:
            tune(sock)
        connection = ServerConnection(
            self._loop,
            sock,
            self._region,
            serves=serves,
            clock=self._clock,
            timings=self._timings,
            on_proved=self._on_proved,
            on_closed=self._on_closed,
        )
        self._unproved[connection] = None
        if len(self._unproved) > _MAX_UNPROVED:
            next(iter(self._unproved)).close("too many connections without proof")
        connection.start()

    def _on_proved(self, connection: ServerConnection) -> None:
        self._unproved.pop(connection, None)
        self._proved.add(connection)
        if len(self._proved) > _MAX_CONNECTIONS:
            connection.close(f"more than {_MAX_CONNECTIONS} connections")

    def _on_closed(self, connection: ServerConnection) -> None:
        self._unproved.pop(connection, None)
        self._proved.discard(connection)


def tune(sock: socket.socket) -> None:
    """No delay for small messages, and an end to connections whose host has gone. Buffer sizes are left to the kernel:
    its own growth measured as fast on loopback as any fixed size, and goes far beyond them on long links."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _resolve(host: str) -> str:
    """The numeric address, so that no peer ever waits for a name server."""
    return str(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0])


def _listen_tcp(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.bind((address, 0))
        sock.listen(256)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _listen_unix(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind("\0" + name)
    sock.listen(256)
    sock.setblocking(False)
    return sock
