"""The server that forks helper processes, from the replica's side."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from transfer.dist.orders import Channel, ChannelError

_ROOT = Path(__file__).parents[2]


class ForkingServer:
    """A process of `fork_server.py`; `channel` is ours. It ends with the thread that makes this. Raises `ChannelError`
    when the system has no process for it."""

    def __init__(self) -> None:
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise ChannelError(f"cannot talk to a process that forks helpers: {error}") from error
        ours.setblocking(False)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "transfer.dist.fork_server", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=_environment(),
            )
        except OSError as error:
            ours.close()
            raise ChannelError(f"cannot start a process that forks helpers: {error}") from error
        finally:
            theirs.close()
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError as error:
            ours.close()
            self._process.kill()
            self._process.wait()
            raise ChannelError(f"cannot watch a process that forks helpers: {error}") from error
        self.channel = Channel(ours)

    def fileno(self) -> int:
        """Readable once the process has ended."""
        return self._pidfd

    def kill(self) -> None:
        self.channel.sock.close()
        self._process.kill()

    def bury(self) -> None:
        """Once it has ended."""
        self._process.wait()
        os.close(self._pidfd)


def _environment() -> dict[str, str]:
    """Ours, with our packages to be found, and no threads: a process that forks should have one."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, "PYTHONPATH": path, **one_thread}
