"""A process group of two as the runners use it: the giver sends pieces, the taker receives them, both in order.

A piece carries its job's number as a tag, so that one of an older job can never be taken for it. A group is used by
one thread, and only as long as all goes well: after any error the process ends.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch.distributed import Work

from transfer.dist.orders import RunnerOrder
from transfer.dist.store import PairStore
from transfer.span_copy import SpanCopier
from transfer.spans import Runs

Pages = npt.NDArray[np.uint8]
"""[pages, page bytes], in host memory."""

GIVER, TAKER = 0, 1
_TAGS = 1 << 31
_OP_TIMEOUT = timedelta(days=1)  # the runner's alarm comes long before; it ends what the library's own would not


class Pending(Protocol):
    """A piece under way."""

    def wait(self) -> None:
        """Return when the sender's memory is free again, or the receiver's filled."""


class PairGroup(Protocol):
    def send(self, pages: Pages, runs: Runs, *, job: int) -> Pending:
        """Send `runs` as one piece; at most `num_slots` pieces may be pending."""

    def receive(self, into: torch.Tensor, lengths: Sequence[int], *, job: int) -> Pending:
        """Receive a piece with runs of `lengths` bytes into host memory, one after the other."""


def join(order: RunnerOrder, store: PairStore, *, host: str) -> PairGroup:
    """Meet the other side. Raises `RuntimeError` when this machine lacks what the backend needs."""
    rank = GIVER if order.role == "give" else TAKER
    group: PairGroup = GlooGroup(order, store, rank, host) if order.backend == "gloo" else NcclGroup(order, store, rank)
    if order.role == "give":  # connections are made by the first piece at the latest
        group.send(np.zeros((1, 1), dtype=np.uint8), np.array([[0, 1]]), job=0).wait()
    else:
        group.receive(torch.zeros(1, dtype=torch.uint8), [1], job=0).wait()
    store.finish()
    return group


class GlooGroup:
    """Gloo over TCP, between the addresses by which the two replicas reach each other already."""

    def __init__(self, order: RunnerOrder, store: PairStore, rank: int, host: str) -> None:
        group: Any = torch.distributed.ProcessGroupGloo  # torch's stubs leave most of it out
        options = group._Options()
        options._devices = [group.create_device(hostname=host)]
        options._threads = 1
        options._timeout = _OP_TIMEOUT
        self._group = group(store, rank, 2, options)
        self._packed = np.empty((order.num_slots, order.slot_pages, order.page_bytes), dtype=np.uint8)
        self._next = itertools.cycle(range(order.num_slots))

    def send(self, pages: Pages, runs: Runs, *, job: int) -> Pending:
        first, count = runs[0].tolist()
        piece = pages[first : first + count]
        if len(runs) > 1:  # a message costs more than the copy
            offsets, lengths = np.ascontiguousarray(runs.T * pages.shape[1])
            piece = self._packed[next(self._next)][: int(runs[:, 1].sum())]
            run = SpanCopier().gather(pages.reshape(-1), offsets, lengths, into=piece.reshape(-1))
            run.advance(run.left)
        return _OfGroup(self._group.send([_tensor(piece)], TAKER, job % _TAGS))

    def receive(self, into: torch.Tensor, lengths: Sequence[int], *, job: int) -> Pending:
        return _OfGroup(self._group.recv([into], GIVER, job % _TAGS))


class _OfGroup:
    def __init__(self, work: Work) -> None:
        self._work = work

    def wait(self) -> None:
        self._work.wait()


class NcclGroup:
    """NCCL, on a stream of its own, so that a transfer neither waits for the model's kernels nor delays their launch.

    Pools are in host memory: a piece passes through a slot of GPU memory on either side. Its runs go as one NCCL
    group. NCCL knows no tags; it keeps the order, and a process group never outlives an error.
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
        self._slots = torch.empty((order.num_slots, order.slot_bytes), dtype=torch.uint8, device=self._device)
        self._next = itertools.cycle(range(order.num_slots))

    def send(self, pages: Pages, runs: Runs, *, job: int) -> Pending:
        listed = runs.tolist()
        with torch.cuda.stream(self._stream):
            staged = self._stage([count * pages.shape[1] for _, count in listed])
            for on_device, (first, count) in zip(staged, listed, strict=True):
                on_device.copy_(_tensor(pages[first : first + count]), non_blocking=True)
            self._group._start_coalescing()
            for on_device in staged:
                self._group.send([on_device], TAKER, 0)
            return self._marked(self._group._end_coalescing())

    def receive(self, into: torch.Tensor, lengths: Sequence[int], *, job: int) -> Pending:
        with torch.cuda.stream(self._stream):
            staged = self._stage(lengths)
            self._group._start_coalescing()
            for on_device in staged:
                self._group.recv([on_device], GIVER, 0)
            work = self._group._end_coalescing()
            work.wait()  # lets the stream wait, not this thread
            for on_device, part in zip(staged, _cut(into, lengths), strict=True):
                part.copy_(on_device, non_blocking=True)
            return self._marked(None)

    def _stage(self, lengths: Sequence[int]) -> list[torch.Tensor]:
        return _cut(self._slots[next(self._next)], lengths)

    def _marked(self, work: Work | None) -> Pending:
        if work is not None:
            work.wait()
        return _OnStream(self._stream.record_event())


class _OnStream:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


def _tensor(pages: Pages) -> torch.Tensor:
    """The same memory, flat. A pool's is read-only, of which torch would warn; nobody here writes to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(pages.reshape(-1))


def _cut(tensor: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Adjacent parts of `lengths` elements, from the first element on."""
    ends = list(itertools.accumulate(lengths))
    return [tensor[end - length : end] for end, length in zip(ends, lengths, strict=True)]
