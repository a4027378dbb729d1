"""Lets peers join process groups: the serving end of `GroupTransport`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from transfer.dist.helpers import Helper, Helpers
from transfer.dist.orders import BackendName, ChannelError, Failed, close_all, make_order
from transfer.io_loop import READ, IoLoop
from transfer.lobby import Lobby, listen_tcp, resolve
from transfer.memory import SharedMemory
from transfer.served import ServedRegion
from transfer.serving import ServerConnection
from transfer.transport import TransferTimings
from transfer.wire import Want

logger = logging.getLogger(__name__)

_MAX_HELPERS = 32


class GroupDoor:
    """Implements `door.Door`. Serves the first `num_pages` pages in `memory`, which must outlive it; the arguments are
    those of `PageServer`. One thread accepts connections; each that proves the secret gets a helper process, which ends
    with the connection and can only read the pool."""

    def __init__(
        self,
        backend: BackendName,
        *,
        memory: SharedMemory,
        page_bytes: int,
        num_pages: int,
        host: str,
        boot: int,
        secret: bytes,
        bind_host: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        timings: TransferTimings | None = None,
    ) -> None:
        self._backend: BackendName = backend
        self._timings = timings or TransferTimings()
        self._region = ServedRegion(
            view=memory.view, fd=memory.reading_fd, page_bytes=page_bytes, num_pages=num_pages, boot=boot, secret=secret
        )
        self._live: set[Helper] = set()
        self._closed = False
        address = resolve(host)
        listener = listen_tcp(resolve(bind_host or host))
        self._address = f"{address}:{listener.getsockname()[1]}"
        self._loop = IoLoop(name=f"{backend}-door", clock=clock)
        self._helpers = Helpers(self._loop, clock=clock, timings=self._timings)
        self._lobby = Lobby(
            self._loop,
            {Want.GROUP: listener},
            self._region,
            clock=clock,
            timings=self._timings,
            on_proved=self._proved,
        )
        self._loop.call_soon(self._lobby.open)

    @property
    def name(self) -> str:
        return self._backend

    def address(self) -> str:
        return self._address

    def close(self, *, timeout_s: float) -> None:
        if self._closed:
            return
        self._closed = True
        shut = threading.Event()

        def close() -> None:
            self._lobby.shut()
            for helper in list(self._live):
                self._end(helper)
            shut.set()

        self._loop.call_soon(close)
        if not shut.wait(timeout_s):
            raise TimeoutError(f"the {self._backend} door is busy for {timeout_s} s")
        self._helpers.close(timeout_s=timeout_s)
        self._loop.close(timeout_s=timeout_s)

    # ---- in the loop's thread -----------------------------------------------------------------------------

    def _proved(self, connection: ServerConnection) -> None:
        sock, key = connection.hand_over()
        with sock:
            if len(self._live) >= _MAX_HELPERS:
                logger.warning("more than %d peers want a %s group", _MAX_HELPERS, self._backend)
                return
            order = make_order(
                "give",
                self._backend,
                key=key,
                boot=self._region.boot,
                num_pages=self._region.num_pages,
                page_bytes=self._region.page_bytes,
                timings=self._timings,
            )
            try:
                helper = self._helpers.start(order, [sock.fileno(), self._region.fd])
            except ChannelError as error:
                logger.warning("%s", error)
                return
        self._live.add(helper)
        self._loop.watch(helper.channel.sock, READ, lambda: self._readable(helper))

    def _readable(self, helper: Helper) -> None:
        try:
            message, fds = helper.channel.receive()
        except BlockingIOError:
            return
        except ChannelError:
            self._end(helper)  # its peer has gone
            return
        close_all(fds)
        if isinstance(message, Failed):
            logger.info("a %s group ended: %s", self._backend, message.error)

    def _end(self, helper: Helper) -> None:
        self._live.remove(helper)
        self._helpers.end(helper)
