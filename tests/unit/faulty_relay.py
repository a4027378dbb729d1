"""A network between two ends of TCP that does what none should: it loses, repeats, reorders, changes and delays bytes.

It also cuts connections. What is sent in one piece, a handshake's message or a request, is lost or repeated as one.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Literal, get_args

from transfer_pools import WAIT_S

from transfer.io_loop import READ, IoLoop

Disturbance = Literal["lose", "repeat", "swap", "change", "delay", "cut"]
DISTURBANCES: tuple[Disturbance, ...] = get_args(Disturbance)
_CHUNK_BYTES = 512


class FaultyRelay:
    """Listens at `port` and passes everything on to `target`. `close` ends all connections."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._next: Disturbance | None = None
        self.done: list[Disturbance] = []
        """What has been done to somebody's bytes."""
        self._pipes: list[_Pipe] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._loop = IoLoop(name="relay", clock=time.monotonic)
        self._loop.call_soon(lambda: self._loop.watch(self._listener, READ, self._accept))

    def disturb(self, how: Disturbance) -> None:
        """Do this to the next bytes that come, on whatever connection."""
        self._loop.call_soon(lambda: setattr(self, "_next", how))

    def calm(self) -> None:
        """Pass on what was delayed, and disturb nothing more."""

        def calm() -> None:
            self._next = None
            for pipe in list(self._pipes):
                pipe.release()

        self._loop.call_soon(calm)

    def close(self) -> None:
        def close() -> None:
            self._loop.forget(self._listener)
            self._listener.close()
            for pipe in list(self._pipes):
                self.cut(pipe)

        self._loop.call_soon(close)
        self._loop.close(timeout_s=WAIT_S)

    # ---- in the loop's thread -----------------------------------------------------------------------------

    def take(self) -> Disturbance | None:
        """What to do to the bytes at hand."""
        how, self._next = self._next, None
        if how is not None:
            self.done.append(how)
        return how

    def cut(self, pipe: _Pipe) -> None:
        """End the connection that `pipe` is one direction of."""
        for each in [each for each in self._pipes if {each.source, each.target} == {pipe.source, pipe.target}]:
            self._pipes.remove(each)
            self._loop.forget(each.source)
        pipe.source.close()
        pipe.target.close()

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(self._target, timeout=WAIT_S)
        except OSError:
            near.close()
            return
        near.settimeout(WAIT_S)
        for source, target in ((near, far), (far, near)):
            pipe = _Pipe(self, source, target)
            self._pipes.append(pipe)
            self._loop.watch(source, READ, pipe.readable)


class _Pipe:
    """One direction of one connection."""

    def __init__(self, relay: FaultyRelay, source: socket.socket, target: socket.socket) -> None:
        self._relay = relay
        self.source = source
        self.target = target
        self._kept = b""
        """To be sent after the next bytes."""
        self._delayed: list[bytes] | None = None

    def readable(self) -> None:
        try:
            data = self.source.recv(_CHUNK_BYTES)
            if data:
                self._pass_on(data)
        except OSError:
            data = b""
        if not data:
            self._relay.cut(self)

    def release(self) -> None:
        """Send what was delayed or kept."""
        delayed, self._delayed = self._delayed or [], None
        with contextlib.suppress(OSError):
            for data in [*delayed, self._kept]:
                self.target.sendall(data)
        self._kept = b""

    def _pass_on(self, data: bytes) -> None:
        match self._relay.take():
            case "lose":
                return
            case "repeat":
                data += data
            case "change":
                data = bytes([data[0] ^ 1]) + data[1:]
            case "swap":
                self._kept += data
                return
            case "delay":
                self._delayed = self._delayed or []
            case "cut":
                self._relay.cut(self)
                return
        data, self._kept = data + self._kept, b""
        if self._delayed is not None:
            self._delayed.append(data)
        else:
            self.target.sendall(data)
