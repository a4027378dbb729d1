"""Starting and ending helper processes, from the replica's side.

A taker can write into our pages, so its end is a fence: `end` reports it once the kernel says that the process is gone,
all its threads and mappings with it, and not when it was merely told to go. A helper gets its order, and the pool with
it, when we hold a descriptor of its process and not before, so that there is never a writer that cannot be fenced.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence

from transfer.dist.forking import ForkingServer
from transfer.dist.orders import Channel, ChannelError, HelperForked, HelperWanted, RunnerOrder, close_all
from transfer.io_loop import READ, IoLoop, Timer
from transfer.transport import TransferTimings

logger = logging.getLogger(__name__)


class Helper:
    """One helper, which is there soon; `channel` is ours. Only `Helpers` makes and ends them."""

    def __init__(self, number: int, channel: Channel, order: RunnerOrder, fds: list[int], overdue: Timer) -> None:
        self.number = number
        self.channel = channel
        self._order = order
        self._fds = fds
        self._overdue = overdue
        self._pidfd = -1

    def fileno(self) -> int:
        """Readable once the process has ended with all its threads."""
        return self._pidfd

    def begin(self, pidfd: int) -> None:
        """It is there: give it its order."""
        self._pidfd = pidfd
        try:
            self.channel.send(self._order, self._fds)
        except ChannelError:  # it has ended already, or would wait for ever; its end is seen at the channel
            self.kill()
        self.discard()

    def discard(self) -> None:
        """What it was to be given is not kept for it any longer."""
        self._overdue.cancel()
        close_all(self._fds)
        self._fds = []

    def kill(self) -> None:
        _kill(self._pidfd)

    def bury(self) -> None:
        """Once it has ended."""
        os.close(self._pidfd)


class Helpers:
    """All helpers of one transport or door. A server that forks them is started at once, and again when one is wanted
    after its end. All but `close` from the thread of `loop`, which must live as long as they do: the kernel ends the
    server with the thread that started it, and its helpers with it."""

    def __init__(self, loop: IoLoop, *, clock: Callable[[], float], timings: TransferTimings) -> None:
        self._loop = loop
        self._clock = clock
        self._timings = timings
        self._server: ForkingServer | None = None
        self._numbers = itertools.count()
        self._wanted: dict[int, Helper] = {}  # those that are not there yet
        self._running: set[Helper] = set()
        self._ending: set[Helper | ForkingServer] = set()
        self._closing = False
        self._all_gone = threading.Event()
        loop.call_soon(self._prepare)

    def start(self, order: RunnerOrder, fds: Sequence[int]) -> Helper:
        """A process that will work on `order` with copies of `fds`. Its channel ends when it does, or when the server
        could not fork it. Raises `ChannelError` when the system has no process for the server."""
        server, number, copies = self._serving(), next(self._numbers), list[int]()
        try:
            copies.extend(os.dup(fd) for fd in fds)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            close_all(copies)
            raise ChannelError(f"cannot ask for a helper process: {error}") from error
        ours.setblocking(False)
        overdue = self._loop.call_at(self._clock() + self._timings.join_s, self._overdue)
        helper = Helper(number, Channel(ours), order, copies, overdue)
        with theirs:
            try:
                server.channel.send(HelperWanted(number=number), [theirs.fileno()])
            except ChannelError:
                helper.discard()
                ours.close()
                raise
        self._wanted[number] = helper
        return helper

    def end(self, helper: Helper, on_gone: Callable[[], None] = lambda: None) -> None:
        """Kill it, in whatever state it is. `on_gone` is called when it has ended: from then on it writes nowhere."""
        self._loop.forget(helper.channel.sock)
        helper.channel.sock.close()
        if self._wanted.pop(helper.number, None) is not None:  # it was given nothing
            helper.discard()
            self._loop.call_soon(on_gone)
            return
        self._running.remove(helper)
        self._ending.add(helper)
        helper.kill()
        self._loop.watch(helper, READ, lambda: self._gone(helper, on_gone))

    def close(self, *, timeout_s: float) -> None:
        """End all of them. Raises `TimeoutError` when one has not gone in time."""
        self._loop.call_soon(self._end_all)
        if not self._all_gone.wait(timeout_s):
            raise TimeoutError(f"{len(self._ending)} helper processes are there {timeout_s} s after they were killed")

    # ---- inner workings -----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        try:
            self._serving()
        except ChannelError as error:
            logger.warning("%s", error)

    def _serving(self) -> ForkingServer:
        if self._closing:
            raise ChannelError("closed")
        if self._server is None:
            self._server = ForkingServer()
            self._loop.watch(self._server.channel.sock, READ, self._readable)
        return self._server

    def _readable(self) -> None:
        assert self._server is not None
        try:
            message, fds = self._server.channel.receive()
        except BlockingIOError:
            return
        except ChannelError as error:
            self._give_up_server(str(error))
            return
        if isinstance(message, HelperForked) and len(fds) == 1:
            self._forked(message.number, fds[0])
            return
        close_all(fds)
        self._give_up_server(f"it says {message}")

    def _forked(self, number: int, pidfd: int) -> None:
        helper = self._wanted.pop(number, None)
        if helper is None:  # ended meanwhile; it was given nothing
            _kill(pidfd)
            os.close(pidfd)
            return
        self._running.add(helper)
        helper.begin(pidfd)

    def _overdue(self) -> None:
        self._give_up_server(f"no helper within {self._timings.join_s} s")

    def _give_up_server(self, why: str) -> None:
        """Helpers that it forked end with it; the channels of those that it did not fork end too."""
        server, self._server = self._server, None
        if server is None:
            return
        if not self._closing:
            logger.warning("the server that forks helper processes ended: %s", why)
        self._loop.forget(server.channel.sock)
        server.kill()
        self._ending.add(server)
        self._loop.watch(server, READ, lambda: self._gone(server))

    def _end_all(self) -> None:
        self._closing = True
        for helper in [*self._wanted.values(), *self._running]:
            self.end(helper)
        self._give_up_server("closed")
        self._look()

    def _gone(self, process: Helper | ForkingServer, on_gone: Callable[[], None] = lambda: None) -> None:
        self._loop.forget(process)
        self._ending.remove(process)
        process.bury()
        on_gone()
        self._look()

    def _look(self) -> None:
        if self._closing and not self._ending:
            self._all_gone.set()


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
