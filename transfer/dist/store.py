"""The rendezvous of a process group of two, over the connection that the two replicas authenticated.

torch's own stores listen on a port where anybody can write. This one has no port: what one side sets is sent to the
other in a tagged frame, and `get` waits for the other side's frames. It is over with `finish`, when the group is
there: then the connection is free for requests.
"""

from __future__ import annotations

import hmac
import socket
import struct
from collections.abc import Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Store

from transfer.wire import WireError

_FRAME = struct.Struct(">BBHI16s")  # who sends, whether more come, lengths of key and value, tag
_TAG_BYTES = 16
_MAX_FRAMES = 64
_MAX_VALUE_BYTES = 16 << 10


class PairStore(Store):
    """Rank `rank`'s end. `sock` has a timeout, by which a wait for the other side ends; it stays the caller's."""

    def __init__(self, sock: socket.socket, key: bytes, *, rank: int) -> None:
        super().__init__()
        self._sock = sock
        self._key = key
        self._rank = rank
        self._values: dict[str, bytes] = {}
        self._frames_sent = 0
        self._frames_received = 0
        self._finished = False  # both sides have
        self._heard_all = False

    def finish(self) -> None:
        """Wait until the other side has finished too."""
        self._send("", b"", more=False)
        while self._receive():
            pass
        self._finished = True

    # ---- called by torch ----------------------------------------------------------------------------------

    def set(self, key: str, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = data
        if not self._finished:
            self._send(key, data, more=True)

    def get(self, key: str) -> bytes:
        while key not in self._values:
            if not self._receive():
                raise WireError(f"the other side finished the rendezvous without {key!r}")
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    # ---- inner workings -----------------------------------------------------------------------------------

    def _send(self, key: str, value: bytes, *, more: bool) -> None:
        body = key.encode() + value
        head = _FRAME.pack(self._rank, more, len(key.encode()), len(value), b"")[:-_TAG_BYTES]
        self._sock.sendall(head + self._tag(self._frames_sent, head, body) + body)
        self._frames_sent += 1

    def _receive(self) -> bool:
        """Take the next frame; False when there are no more."""
        if self._heard_all:
            return False
        raw = receive_exactly(self._sock, _FRAME.size)
        rank, more, key_bytes, value_bytes, tag = _FRAME.unpack(raw)
        if value_bytes > _MAX_VALUE_BYTES or self._frames_received >= _MAX_FRAMES:
            raise WireError(f"frame {self._frames_received} of the rendezvous has {value_bytes} bytes: too much")
        body = receive_exactly(self._sock, key_bytes + value_bytes)
        expected = self._tag(self._frames_received, raw[:-_TAG_BYTES], body)
        if rank == self._rank or not hmac.compare_digest(tag, expected):
            raise WireError("a frame of the rendezvous has a wrong tag")
        self._frames_received += 1
        if more:
            self._values[body[:key_bytes].decode()] = body[key_bytes:]
        self._heard_all = not more
        return bool(more)

    def _tag(self, index: int, head: bytes, body: bytes) -> bytes:
        return hmac.digest(self._key, b"rendezvous" + struct.pack(">I", index) + head + body, "sha256")[:_TAG_BYTES]


def receive_exactly(sock: socket.socket, count: int) -> bytes:
    """`count` bytes. Raises `WireError` when the connection ends before, `TimeoutError` when its time is up."""
    received = bytearray()
    while len(received) < count:
        data = sock.recv(count - len(received))
        if not data:
            raise WireError("the other side closed the connection")
        received += data
    return bytes(received)
