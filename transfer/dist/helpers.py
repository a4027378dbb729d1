"""Starting and ending helper processes, from the replica's side."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transfer.dist.orders import BackendName, Channel, ChannelError, RunnerOrder
from transfer.transport import TransferTimings

_SLOT_BYTES = 8 << 20
"""Smaller pieces cost processor time: on two busy cores 64 MB reached 48% of plain gloo's speed in pieces of 1 MB, 77%
in pieces of 4 MB, and 87% in pieces of 8 MB."""
_MAX_SLOT_PAGES = 2048
_NUM_SLOTS = 3
_ROOT = Path(__file__).parents[2]


class Helper:
    """One running helper; `channel` is ours, and so is its end: nobody but `Helpers` waits for the process."""

    def __init__(self, channel: Channel, process: subprocess.Popen[bytes]) -> None:
        self.channel = channel
        self.process = process

    def kill(self) -> None:
        """End it, in whatever state it is. Its memory and connections are the kernel's to clear away."""
        self.channel.sock.close()
        self.process.kill()


class Helpers:
    """All helpers of one transport or door. `start` from its loop's thread, which must live as long as they do: the
    kernel ends a helper with the thread that started it."""

    def __init__(self) -> None:
        self._helpers: list[Helper] = []

    def start(self, order: RunnerOrder, fds: Sequence[int]) -> Helper:
        """A process that works on `order` with copies of `fds`. Raises `ChannelError` when the system has none."""
        self._helpers = [helper for helper in self._helpers if helper.process.poll() is None]
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
        helper = Helper(Channel(ours), process)
        self._helpers.append(helper)
        try:
            helper.channel.send(order, fds)
        except ChannelError:
            helper.kill()
            raise
        return helper

    def close(self, *, timeout_s: float) -> None:
        """End all of them. Raises `TimeoutError` when one has not gone in time."""
        for helper in self._helpers:
            helper.kill()
        deadline = time.monotonic() + timeout_s
        for helper in self._helpers:
            try:
                helper.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(
                    f"helper process {helper.process.pid} is there {timeout_s} s after its end"
                ) from error


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
    """Both sides cut pieces alike, as their page size is the same."""
    return RunnerOrder(
        role="take" if role == "take" else "give",
        backend=backend,
        key=key,
        boot=boot,
        num_pages=num_pages,
        page_bytes=page_bytes,
        slot_pages=max(1, min(_MAX_SLOT_PAGES, _SLOT_BYTES // page_bytes)),
        num_slots=_NUM_SLOTS,
        join_s=timings.join_s,
        piece_s=timings.piece_s,
    )


def _environment() -> dict[str, str]:
    """Ours, with our packages to be found, and no threads that only wait."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
