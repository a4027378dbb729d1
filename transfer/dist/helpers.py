"""Starting and ending helper processes, from the replica's side.

A taker can write into our pages, so its end is a fence: `end` reports it once the kernel says that the process is gone,
all its threads and mappings with it, and not when it was merely told to go.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from transfer.dist.orders import BackendName, Channel, ChannelError, RunnerOrder
from transfer.io_loop import READ, IoLoop
from transfer.transport import TransferTimings

_PIECE_BYTES = 16 << 20
_MAX_PIECE_PAGES = 2048
_ROOT = Path(__file__).parents[2]


class Helper:
    """One running helper; `channel` is ours. Only `Helpers` makes and ends them."""

    def __init__(self, channel: Channel, process: subprocess.Popen[bytes]) -> None:
        self.channel = channel
        self.process = process
        self._pidfd = os.pidfd_open(process.pid)

    def fileno(self) -> int:
        """Readable once the process has ended with all its threads."""
        return self._pidfd

    def bury(self) -> None:
        """Once it has ended."""
        self.process.wait()
        os.close(self._pidfd)


class Helpers:
    """All helpers of one transport or door. All but `close` from the thread of `loop`, which must live as long as they
    do: the kernel ends a helper with the thread that started it."""

    def __init__(self, loop: IoLoop) -> None:
        self._loop = loop
        self._running: set[Helper] = set()
        self._ending: set[Helper] = set()
        self._closing = False
        self._all_gone = threading.Event()

    def start(self, order: RunnerOrder, fds: Sequence[int]) -> Helper:
        """A process that works on `order` with copies of `fds`. Raises `ChannelError` when the system has none."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "transfer.dist.runner", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(),
            )
        except OSError as error:
            ours.close()
            raise ChannelError(f"cannot start a helper process: {error}") from error
        finally:
            theirs.close()
        try:
            helper = Helper(Channel(ours), process)
        except OSError as error:
            ours.close()
            process.kill()
            process.wait()
            raise ChannelError(f"cannot watch a helper process: {error}") from error
        self._running.add(helper)
        try:
            helper.channel.send(order, fds)
        except ChannelError:
            self.end(helper)
            raise
        return helper

    def end(self, helper: Helper, on_gone: Callable[[], None] = lambda: None) -> None:
        """Kill it, in whatever state it is. `on_gone` is called when it has ended: from then on it writes nowhere."""
        self._running.remove(helper)
        self._ending.add(helper)
        self._loop.forget(helper.channel.sock)
        helper.channel.sock.close()
        helper.process.kill()
        self._loop.watch(helper, READ, lambda: self._gone(helper, on_gone))

    def close(self, *, timeout_s: float) -> None:
        """End all of them. Raises `TimeoutError` when one has not gone in time."""
        self._loop.call_soon(self._end_all)
        if not self._all_gone.wait(timeout_s):
            pids = sorted(helper.process.pid for helper in self._ending)
            raise TimeoutError(f"helper processes {pids} are there {timeout_s} s after they were killed")

    def _end_all(self) -> None:
        self._closing = True
        for helper in list(self._running):
            self.end(helper)
        self._look()

    def _gone(self, helper: Helper, on_gone: Callable[[], None]) -> None:
        self._loop.forget(helper)
        self._ending.remove(helper)
        helper.bury()
        on_gone()
        self._look()

    def _look(self) -> None:
        if self._closing and not self._ending:
            self._all_gone.set()


def make_order(
    role: str,
    backend: BackendName,
    *,
    key: bytes,
    boot: int,
    num_pages: int,
    page_bytes: int,
    timings: TransferTimings,
) -> RunnerOrder:
    """`num_pages` is of the pool that the helper is given. Both sides cut pieces alike, as their page size is the
    same."""
    return RunnerOrder(
        role="take" if role == "take" else "give",
        backend=backend,
        key=key,
        boot=boot,
        num_pages=num_pages,
        page_bytes=page_bytes,
        piece_pages=max(1, min(_MAX_PIECE_PAGES, _PIECE_BYTES // page_bytes)),
        join_s=timings.join_s,
        piece_s=timings.piece_s,
    )


def _environment() -> dict[str, str]:
    """Ours, with our packages to be found, and no threads that only wait."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
