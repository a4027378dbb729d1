"""Where connections come in: accepts them on listening sockets, and bounds what those without proof can cost.

Belongs to whoever serves a pool (`server.py`, `dist/door.py`) and lives in its loop's thread. Connections that have not
proved the cluster secret are bounded in number (the oldest goes first), in bytes and in time (`serving.py`).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping

from transfer.io_loop import READ, IoLoop
from transfer.served import ServedRegion
from transfer.serving import ServerConnection
from transfer.transport import TransferTimings
from transfer.wire import Want

logger = logging.getLogger(__name__)

_MAX_UNPROVED = 64
_MAX_CONNECTIONS = 1024
_ACCEPT_PAUSE_S = 0.5


class Lobby:
    """Takes `listeners` over, each for one kind of connection. Loop thread only, but for the constructor.

    Lifecycle: `open`, then `shut` before the loop ends. `on_proved` hears of each connection that knows the secret.
    """

    def __init__(
        self,
        loop: IoLoop,
        listeners: Mapping[Want, socket.socket],
        region: ServedRegion,
        *,
        clock: Callable[[], float],
        timings: TransferTimings,
        on_proved: Callable[[ServerConnection], None] = lambda connection: None,
    ) -> None:
        self._loop = loop
        self._listeners = listeners
        self._region = region
        self._clock = clock
        self._timings = timings
        self._on_proved = on_proved
        self._unproved: dict[ServerConnection, None] = {}  # oldest first
        self._proved: set[ServerConnection] = set()
        self._shut = False

    @property
    def num_connections(self) -> int:
        """Connections open now, proved or not."""
        return len(self._unproved) + len(self._proved)

    def open(self) -> None:
        """Accept connections."""
        if not self._shut:
            for want, listener in self._listeners.items():
                self._watch(want, listener)

    def shut(self) -> None:
        """Stop listening and drop every connection."""
        self._shut = True
        for listener in self._listeners.values():
            self._loop.forget(listener)
            listener.close()
        for connection in [*self._unproved, *self._proved]:
            connection.close("the server closes")
        self._on_proved = lambda connection: None

    def _watch(self, want: Want, listener: socket.socket) -> None:
        self._loop.watch(listener, READ, lambda: self._accept(want, listener))

    def _accept(self, want: Want, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # out of descriptors: look again when some may be free
            logger.warning("cannot accept a page connection: %s", error)
            for each in self._listeners.values():
                self._loop.forget(each)
            self._loop.call_at(self._clock() + _ACCEPT_PAUSE_S, self.open)
            return
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            tune(sock)
        connection = ServerConnection(
            self._loop,
            sock,
            self._region,
            serves=want,
            clock=self._clock,
            timings=self._timings,
            on_proved=self._proved_itself,
            on_closed=self._closed,
        )
        self._unproved[connection] = None
        if len(self._unproved) > _MAX_UNPROVED:
            next(iter(self._unproved)).close("too many connections without proof")
        connection.start()

    def _proved_itself(self, connection: ServerConnection) -> None:
        self._unproved.pop(connection, None)
        self._proved.add(connection)
        if len(self._proved) > _MAX_CONNECTIONS:
            connection.close(f"more than {_MAX_CONNECTIONS} connections")
            return
        self._on_proved(connection)

    def _closed(self, connection: ServerConnection) -> None:
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


def resolve(host: str) -> str:
    """The numeric address, so that no peer ever waits for a name server."""
    return str(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0])


def listen_tcp(address: str) -> socket.socket:
    """A listening socket at a port of the system's choice."""
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
