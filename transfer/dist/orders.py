"""What a replica and its helper processes tell each other: one message per packet of a Unix socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Literal

import msgspec

from transfer.transport import TransferTimings

_PIECE_BYTES = 16 << 20
_MAX_PIECE_PAGES = 2048
_MAX_BYTES = 64 << 10
_MAX_FDS = 2

BackendName = Literal["gloo", "nccl"]


class RunnerOrder(msgspec.Struct, frozen=True, tag="order"):
    """The first message to a runner. Descriptors come along: the authenticated connection to the other runner, and the
    memory of its replica's pool."""

    role: Literal["take", "give"]
    backend: BackendName
    key: bytes
    """Of the connection (`wire.connection_key`)."""
    boot: int
    """Of the serving replica."""
    num_pages: int
    """Of the pool that comes along."""
    page_bytes: int
    piece_pages: int
    """The largest piece."""
    join_s: float
    piece_s: float

    @property
    def pool_bytes(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def piece_bytes(self) -> int:
        return self.piece_pages * self.page_bytes


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


class TakePiece(msgspec.Struct, frozen=True, tag="take"):
    """To a taker: have the pages of `sources` sent, and put into those of `targets`. Job numbers rise."""

    job: int
    sources: bytes
    """Runs, as in a request (`wire_requests.py`)."""
    targets: bytes
    """As many runs, of the same lengths."""
    read_soon: bool
    """To be verified, that is."""


class Joined(msgspec.Struct, frozen=True, tag="joined"):
    """From a runner: the group is there."""


class Landed(msgspec.Struct, frozen=True, tag="landed"):
    """From a taker: this piece is in its pages, and nothing more is written for it. Pieces land in the order in which
    they were asked for."""

    job: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """From a runner, which ends: why."""

    error: str


class HelperWanted(msgspec.Struct, frozen=True, tag="wanted"):
    """To a fork server: fork a helper, whose channel comes along."""

    number: int
    """No two are alike."""


class HelperForked(msgspec.Struct, frozen=True, tag="forked"):
    """From a fork server: that helper is there; a descriptor of its process (pidfd) comes along."""

    number: int


Message = RunnerOrder | TakePiece | Joined | Landed | Failed | HelperWanted | HelperForked


class ChannelError(Exception):
    """The other end is gone, or does not listen, or talks nonsense."""


class Channel:
    """One end; owns `sock`. Not blocking at the replica's end, blocking at the runner's."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Message)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self.sock, [self._encoder.encode(message)], list(fds), socket.MSG_NOSIGNAL)
        except OSError as error:
            raise ChannelError(f"the other end takes no message: {error}") from error

    def receive(self) -> tuple[Message, list[int]]:
        """The next message and its descriptors, the caller's to close. Raises `BlockingIOError` when there is none
        yet."""
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, _MAX_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ChannelError(str(error)) from error
        try:
            if not data:
                raise ChannelError("the other end is gone")
            return self._decoder.decode(data), fds
        except (ChannelError, msgspec.MsgspecError) as error:
            close_all(fds)
            raise ChannelError(str(error)) from error


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
