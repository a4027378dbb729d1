"""This process's end of a mooncake process: start it, talk to it, kill it.

Lifecycle: the constructor starts the child; its first message is `Ready` or `Refused`; `kill` ends it, and returns when
the kernel has taken everything from it, so that nothing it was doing goes on. A child ends by itself when its parent
does. Nothing but `wait_ready`, `ending` and `kill` ever waits.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from transfer.mooncake.library import MooncakeUnavailable
from transfer.mooncake.messages import MAX_MESSAGE_BYTES, Answer, Ready, Refused, Request, Settings

_NO_PROGRESS_S = "5"
_HOUSE = Path(__file__).parents[2]


class EngineProcess:
    """`memory_fd` is shared with the child, mapped for writing only where `serves` is not set or RDMA asks for it."""

    def __init__(
        self, *, memory_fd: int, memory_bytes: int, host: str, ib_device: str, serves: bool, identity: str = ""
    ) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        settings = Settings(
            socket_fd=theirs.fileno(),
            memory_fd=memory_fd,
            memory_bytes=memory_bytes,
            host=host,
            ib_device=ib_device,
            serves=serves,
            identity=identity,
        )
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "transfer.mooncake.child", msgspec.json.encode(settings).decode()],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory_fd),
                env=_environment(rdma=bool(ib_device)),
            )
        except OSError:
            self.sock.close()
            raise
        finally:
            theirs.close()
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(Answer)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, request: Request) -> None:
        """Raises `OSError` when the child has ended or does not listen."""
        self.sock.send(self._encoder.encode(request))

    def receive(self) -> Answer | None:
        """The next message; None when there is none yet. Raises `EOFError` when the child has ended."""
        try:
            data = self.sock.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise EOFError(str(error)) from error
        if not data:
            raise EOFError("it has ended")
        answer: Answer = self._decoder.decode(data)
        return answer

    def wait_ready(self, *, timeout_s: float) -> Ready:
        """Raises `MooncakeUnavailable` when the child refuses, dies or is not ready in time."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self.sock], [], [], left)[0]:
                break
            try:
                answer = self.receive()
            except EOFError:
                raise MooncakeUnavailable(f"the mooncake process ended before it was ready: {self.ending()}") from None
            if isinstance(answer, Refused):
                raise MooncakeUnavailable(answer.error)
            if isinstance(answer, Ready):
                return answer
        raise MooncakeUnavailable(f"the mooncake process is not ready after {timeout_s} s")

    def ending(self) -> str:
        """How an ended child ended, for a message. Waits a moment: its socket ends before its state is known."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(1.0)
            return f"signal {-status}" if status < 0 else f"exit status {status}"
        return "still ending"

    def kill(self, *, timeout_s: float) -> None:
        """Raises `TimeoutError` when the kernel does not let go of it in time; its memory must then be kept."""
        self._process.kill()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"mooncake process {self.pid} has not ended {timeout_s} s after SIGKILL") from None


def _environment(*, rdma: bool) -> dict[str, str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_HOUSE), os.environ.get("PYTHONPATH", "")])),
        "MC_HANDSHAKE_CONNECT_TIMEOUT": _NO_PROGRESS_S,
        "MC_TCP_STATUS_TIMEOUT_SEC": _NO_PROGRESS_S,
        "MC_TCP_PROGRESS_TIMEOUT_SEC": _NO_PROGRESS_S,
    }
    if not rdma:
        environment["MC_FORCE_TCP"] = "1"  # or the library takes whatever RDMA device it finds
    return environment
