"""Takes KV pages out of peers' pools into ours: the receiving end of every transfer.

Lifecycle: `attach` a peer when its ticket is known, `fetch` pages from it, `detach` it when it is lost, `close` in
the end. Every `fetch` is answered by exactly one `on_done`, in a transfer thread or within the call of `fetch` itself,
after the last byte that will ever be written for it: from then on its target pages are the caller's again, whatever the
result says. A failed attempt is repeated once on each further transport that reaches the peer (`choice.py`) before the
job fails; nothing is remembered against a peer but that its shared memory is not asked for again at once.

Nothing here waits for anybody but `close`. Locks are held for bookkeeping only, never while copying or calling back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.handshake import PoolShape, RegionTicket
from protocol.rooms import PeerAddress
from transfer import span_io
from transfer.choice import TransportName, TransportParts, landing_in, make_transports, ways_of
from transfer.door import moved_doors
from transfer.faults import Faults
from transfer.int8_codec import Int8Codec
from transfer.io_loop import IoLoop
from transfer.job_book import JobBook
from transfer.jobs import FetchJob, FetchResult, OnDone, Peer, checked_sources, checked_targets, counted_tokens
from transfer.memory import SharedMemory
from transfer.our_pool import OurPool
from transfer.records import StopReason
from transfer.span_copy import SpanCopier
from transfer.spans import Pages
from transfer.transport import TransferTimings, Transport

if TYPE_CHECKING:
    from transfer.cuda.memory import DeviceMemory

_AT_ONCE_BYTES = 512 << 10
"""A page of most models. Copying and hashing so much takes as long as two threads take to wake."""

__all__ = ["FetchJob", "FetchResult", "PageFetcher", "TransportName"]


class PageFetcher:
    """Writes into the pages of `memory`, `page_bytes` bytes each; `memory` must outlive it.

    `shape` and `layout` say what our pages mean, and so whether a peer's are taken whole, in parts or not at all
    (`our_pool.py`). With a `codec` KV comes in 8 bits over TCP, from peers that have one too. `num_threads` threads
    copy within the host, one more serves all sockets; copies of at most `at_once_bytes` are made within the host, and
    over TCP asked for, by the caller, while those threads are idle. `transport` restricts the choice; `auto` prefers
    shared memory, `disk` takes pages out of `folder`. With `verify` pages that came without a checksum are refused.
    """

    def __init__(
        self,
        *,
        memory: SharedMemory | DeviceMemory,
        page_bytes: int,
        layout: str,
        shape: PoolShape | None = None,
        codec: Int8Codec | None = None,
        secret: bytes,
        num_threads: int = 2,
        at_once_bytes: int = _AT_ONCE_BYTES,
        verify: bool = False,
        transport: TransportName = "auto",
        ib_device: str = "",
        folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        faults: Faults | None = None,
        timings: TransferTimings | None = None,
    ) -> None:
        if not 0 < page_bytes <= memory.nbytes:
            raise ValueError(f"pages of {page_bytes} bytes in a memory of {memory.nbytes} bytes")
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; at least 1 is needed")
        if not secret:
            raise ValueError("the cluster secret is empty; peers serve pages only to those who know one")
        ways = ways_of(transport, folder=folder, on_gpu=not isinstance(memory, SharedMemory))
        self._pool = OurPool(
            page_bytes=page_bytes, num_pages=memory.nbytes // page_bytes, layout=layout, shape=shape, codec=codec
        )
        self._verify = verify
        self._timings = timings or TransferTimings()
        self._landing = landing_in(memory, page_bytes=page_bytes, faults=faults)
        SpanCopier()  # compiled, on a machine's first start, before the first copy needs it
        span_io.prepare()
        self._loop = IoLoop(name="page-fetcher", clock=clock)
        self._jobs = JobBook(self._loop, self._pool, clock=clock)  # its lock guards the two that follow
        self._peers: dict[PeerAddress, Peer] = {}
        self._closed = False
        parts = TransportParts(
            loop=self._loop,
            landing=self._landing,
            secret=secret,
            num_threads=num_threads,
            at_once_bytes=at_once_bytes,
            clock=clock,
            timings=self._timings,
            ib_device=ib_device,
            folder=folder,
        )
        try:
            self._transports = make_transports(ways, parts)
        except Exception:
            self._loop.close(timeout_s=self._timings.close_s)
            self._landing.close()
            raise

    # ---- peers --------------------------------------------------------------------------------------------

    def attach(self, peer: PeerAddress, ticket: RegionTicket) -> None:
        """Make `peer`'s pages available to `fetch`, and begin to connect. Another boot is another peer. Attached again
        with the same ticket nothing changes; with one whose doors have moved, copies that run go on and others take the
        new doors; with any other it is detached first.

        Raises `ValueError` when nothing of its pages means anything in ours, or parts of them would have to be taken by
        a transport that takes whole pages only.
        """
        cut = self._pool.cut(peer.replica_id, ticket)
        if cut is not None and not self._transports[0].takes_grains:
            raise ValueError(
                f"replica {peer.replica_id} has KV pages of another shape ({ticket.shape}) than this one "
                f"({self._pool.shape}), and transport {self._transports[0].name!r} takes whole pages only; "
                "set transport to auto, shm or tcp, or give all pools the same page size and tensor-parallel size"
            )
        in_range = 0 <= peer.boot < 2**64 and 0 < ticket.num_pages < 2**32 and 0 <= ticket.tcp_port < 2**16
        if not in_range:
            raise ValueError(f"replica {peer} has a ticket out of range: {ticket}")
        coded = self._pool.coded(peer.replica_id, ticket, cut)
        attached = Peer(address=peer, ticket=ticket, cut=cut, coded=coded)
        with self._jobs.lock:
            self._check_open()
            before = self._peers.get(peer)
            moved = None if before is None else moved_doors(before.ticket, ticket)
            if before is not None and moved is not None:
                before.ticket = ticket
                attached = before
            else:
                self._peers[peer] = attached
        if before is not None and moved is None:
            self._release(before)
        for transport in self._ways_to(attached)[:1]:
            if moved is None or transport.name in moved:
                transport.attach(attached)

    def detach(self, peer: PeerAddress) -> None:
        """End every copy from `peer` and let go of its memory and connections. Returns at once; the jobs are answered
        as they end. A peer that is not attached is none of our business."""
        with self._jobs.lock:
            attached = self._peers.pop(peer, None)
        if attached is not None:
            self._release(attached)

    # ---- jobs ---------------------------------------------------------------------------------------------

    def fetch(self, job: FetchJob, on_done: OnDone) -> None:
        """Start `job`. Whatever the peer may have got wrong is answered through `on_done`.

        Raises `ValueError` for what only the caller can get wrong: target pages that are not ours or named twice,
        lists of unequal length, a key in use.
        """
        with self._jobs.lock:
            self._check_open()
            if self._jobs.find(job.key) is not None:
                raise ValueError(f"a fetch with key {job.key!r} is running already")
            peer = self._peers.get(job.peer)
            counts_alike = job.grain_tokens == counted_tokens(peer)  # else it is refused below
            cut = None if peer is None else peer.cut
            targets = checked_targets(job, num_pages=self._pool.num_units(cut)) if counts_alike else None
            record = self._jobs.add(job, peer, on_done)
        try:
            attached, sources = self._checked(job, peer)
        except ValueError as error:
            self._jobs.answer(record, error=str(error))
            return
        if targets is not None and len(targets):
            self._jobs.begin(record, sources, targets, self._ways_to(attached))
        else:
            self._jobs.answer(record, error=None)

    def cancel(self, key: Hashable) -> None:
        """Ask the job to end soon; `on_done` tells when it has. A job that is done, or unknown, is left alone; one that
        completes at this very moment is answered with success."""
        record = self._jobs.find(key)
        if record is not None:
            self._jobs.stop(record, StopReason.CANCELLED)

    @property
    def num_jobs(self) -> int:
        """Jobs not answered yet."""
        return self._jobs.num_unanswered

    @property
    def is_alive(self) -> bool:
        """Whether jobs can still be answered."""
        return self._loop.is_alive

    def close(self) -> None:
        """End every job, then every thread and connection. Not to be called from `on_done`.

        Raises `TimeoutError` when a job does not end in time; the memory must then be kept.
        """
        with self._jobs.lock:
            if self._closed:
                return
            self._closed = True
        for record in self._jobs.records():
            self._jobs.stop(record, StopReason.CLOSED)
        if not self._jobs.wait_empty(self._timings.close_s):
            left = self._jobs.num_unanswered
            raise TimeoutError(f"{left} fetches have not ended after {self._timings.close_s} s")
        for peer in list(self._peers):
            self.detach(peer)
        for transport in self._transports:
            transport.close(timeout_s=self._timings.close_s)
        self._loop.close(timeout_s=self._timings.close_s)
        self._landing.close()

    # ---- inner workings -----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the fetcher is closed")

    def _checked(self, job: FetchJob, peer: Peer | None) -> tuple[Peer, Pages]:
        """The peer and its pages, if they can be had. Raises `ValueError` that says why not."""
        if peer is None:
            raise ValueError(f"replica {job.peer.replica_id}, boot {job.peer.boot}, is not attached")
        if not self._ways_to(peer):
            names = " and ".join(transport.name for transport in self._transports)
            raise ValueError(f"replica {job.peer.replica_id} cannot be reached by {names}")
        return peer, checked_sources(job, peer, verify=self._verify)

    def _ways_to(self, peer: Peer) -> list[Transport]:
        return [
            transport
            for transport in self._transports
            if transport.reaches(peer.ticket) and (peer.cut is None or transport.takes_grains)
        ]

    def _release(self, attached: Peer) -> None:
        for record in self._jobs.records(of=attached):
            self._jobs.stop(record, StopReason.DETACHED)
        for transport in self._transports:
            transport.detach(attached)
