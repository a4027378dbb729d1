"""A process group of two as the runners use it: the giver sends messages, the taker receives them, both in order.

A message carries its piece's job number as a tag, so that one of an older job can never be taken for it. A group is
used by one thread, and only as long as all goes well: after any error the process ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch.distributed import Work

from transfer.dist.orders import RunnerOrder
from transfer.dist.store import PairStore

GIVER, TAKER = 0, 1
_TAGS = 1 << 31
_LOCAL_SEND_BYTES = 512 << 10  # the kernel doubles it for its own books
_OP_TIMEOUT = timedelta(days=1)  # the runner's alarm comes long before; it ends what the library's own would not


class Pending(Protocol):
    """A message under way."""

    def wait(self) -> None:
        """Return when the sender's memory is free again, or the receiver's filled."""


class PairGroup(Protocol):
    """Messages are uint8 [bytes] in host memory, at most as long as a piece; they arrive in the order in which they are
    sent."""

    def send(self, message: torch.Tensor, *, job: int) -> Pending:
        """Send a message of the piece `job`."""

    def receive(self, into: torch.Tensor, *, job: int) -> Pending:
        """Receive the next message of that piece."""


def join(order: RunnerOrder, store: PairStore, *, host: str) -> PairGroup:
    """Meet the other side. Raises `RuntimeError` when this machine lacks what the backend needs."""
    rank = GIVER if order.role == "give" else TAKER
    group: PairGroup = GlooGroup(store, rank, host) if order.backend == "gloo" else NcclGroup(order, store, rank)
    if order.role == "give":  # connections are made by the first piece at the latest
        group.send(torch.zeros(1, dtype=torch.uint8), job=0).wait()
    else:
        group.receive(torch.zeros(1, dtype=torch.uint8), job=0).wait()
    store.finish()
    return group


class GlooGroup:
    """Gloo over TCP, between the addresses by which the two replicas reach each other already."""

    def __init__(self, store: PairStore, rank: int, host: str) -> None:
        group: Any = torch.distributed.ProcessGroupGloo  # torch's stubs leave most of it out
        options = group._Options()
        options._devices = [group.create_device(hostname=host)]
        options._threads = 1
        options._timeout = _OP_TIMEOUT
        before = _open_sockets()
        self._group = group(store, rank, 2, options)
        for fd in _open_sockets() - before:
            _limit_if_local(fd)

    def send(self, message: torch.Tensor, *, job: int) -> Pending:
        return _OfGroup(self._group.send([message], TAKER, job % _TAGS))

    def receive(self, into: torch.Tensor, *, job: int) -> Pending:
        return _OfGroup(self._group.recv([into], GIVER, job % _TAGS))


class _OfGroup:
    def __init__(self, work: Work) -> None:
        self._work = work

    def wait(self) -> None:
        self._work.wait()


def _open_sockets() -> set[int]:
    """Descriptors of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the folder itself
            if stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                found.add(int(name))
    return found


def _limit_if_local(fd: int) -> None:
    """Let less wait in a connection within this host than the caches hold: what the kernel copies out again is then
    still there, which saves about a third of the processors' time. Between hosts the kernel knows best."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:  # a listener has no peer
        if sock.getsockname()[0] == sock.getpeername()[0]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_SEND_BYTES)


class NcclGroup:
    """NCCL, on a stream of its own, so that a transfer neither waits for the model's kernels nor delays their launch.

    Pools are in host memory: a message passes through GPU memory on either side. NCCL knows no tags; it keeps the
    order, and a process group never outlives an error.
    """

    def __init__(self, order: RunnerOrder, store: PairStore, rank: int) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("nccl needs an NVIDIA GPU that torch can use; set transfer.transport to gloo or auto")
        group: Any = torch.distributed.ProcessGroupNCCL
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        options = group.Options()
        options._timeout = _OP_TIMEOUT
        self._group = group(store, rank, 2, options)
        self._staged = torch.empty(order.piece_bytes, dtype=torch.uint8, device=self._device)
        """One message after the other, in the stream's own order."""

    def send(self, message: torch.Tensor, *, job: int) -> Pending:
        with torch.cuda.stream(self._stream):
            staged = self._staged[: message.numel()]
            staged.copy_(message, non_blocking=True)
            self._group.send([staged], TAKER, 0).wait()  # lets the stream wait, not this thread
            return _OnStream(self._stream.record_event())

    def receive(self, into: torch.Tensor, *, job: int) -> Pending:
        with torch.cuda.stream(self._stream):
            staged = self._staged[: into.numel()]
            self._group.recv([staged], GIVER, 0).wait()
            into.copy_(staged, non_blocking=True)
            return _OnStream(self._stream.record_event())


class _OnStream:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()
