"""Serves one KV pool to receivers: its memory to those on this host, its pages over TCP to the others.

Lifecycle: `PageServer(...)` listens at once, on an abstract Unix socket and on a TCP port of its own choice;
`ticket()` says where, for the replica's welcome to its peers; `close()` ends every connection. One thread does it all
and never blocks, so a receiver that hangs, floods or talks nonsense costs the others nothing: connections without
proof are bounded in number (the oldest goes first), in bytes and in time. Receivers only read: nothing here can change
a page.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Sequence

import msgspec

from protocol.handshake import PoolShape, RegionTicket
from transfer import span_io
from transfer.door import Door
from transfer.int8_codec import Int8Codec
from transfer.io_loop import IoLoop
from transfer.lobby import Lobby, listen_tcp, resolve
from transfer.memory import SharedMemory, host_id
from transfer.served import ServedRegion
from transfer.transport import TransferTimings
from transfer.wire import Want


class PageServer:
    """Serves the first `num_pages` pages of `page_bytes` bytes in `memory`, which must outlive the server.

    `layout` is the pool's fingerprint, `shape` what receivers with another one need to take parts of pages, `codec`
    what serves KV in 8 bits to those who ask for it, and `boot` this life of the replica (an unsigned 64-bit number).
    `host` is the address or name that peers reach this machine by, `bind_host` the one to listen on when that differs;
    the port is chosen by the system. The ticket also names `doors`, which stay their owner's. Raises `ValueError` for
    a region larger than its memory, an empty secret or a `host` that is no single machine's, and `OSError` when a host
    is unknown or cannot be listened on.
    """

    def __init__(
        self,
        *,
        memory: SharedMemory,
        page_bytes: int,
        num_pages: int,
        layout: str,
        shape: PoolShape | None = None,
        codec: Int8Codec | None = None,
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
        region = ServedRegion(
            view=memory.view,
            fd=memory.reading_fd,
            page_bytes=page_bytes,
            num_pages=num_pages,
            boot=boot,
            secret=secret,
            shape=shape,
            codec=codec,
        )
        span_io.prepare()
        self._timings = timings or TransferTimings()
        tcp_host = resolve(host)
        tcp = listen_tcp(resolve(bind_host or host))
        shm_socket = f"pd-serve-{secrets.token_hex(12)}"
        unix = _listen_unix(shm_socket)
        self._ticket = RegionTicket(
            num_pages=num_pages,
            page_bytes=page_bytes,
            layout=layout,
            shape=shape,
            int8=codec is not None,
            host_id=host_id(),
            shm_socket=shm_socket,
            tcp_host=tcp_host,
            tcp_port=tcp.getsockname()[1],
        )
        self._doors = list(doors)
        self._closed = False
        self._loop = IoLoop(name="page-server", clock=clock)
        self._lobby = Lobby(
            self._loop, {Want.PAGES: tcp, Want.MEMORY: unix}, region, clock=clock, timings=self._timings
        )
        self._loop.call_soon(self._lobby.open)

    def ticket(self) -> RegionTicket:
        """How peers reach this pool at present: its doors can move."""
        return msgspec.structs.replace(self._ticket, doors={door.name: door.address() for door in self._doors})

    @property
    def is_alive(self) -> bool:
        """Whether peers are still answered."""
        return self._loop.is_alive

    @property
    def num_connections(self) -> int:
        """Connections open now, proved or not."""
        return self._lobby.num_connections

    def close(self) -> None:
        """Stop listening and drop every connection. Raises `TimeoutError` when the thread does not end."""
        if self._closed:
            return
        self._closed = True
        self._loop.call_soon(self._lobby.shut)
        self._loop.close(timeout_s=self._timings.close_s)


def _listen_unix(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind("\0" + name)
    sock.listen(256)
    sock.setblocking(False)
    return sock
