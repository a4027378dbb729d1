"""Transport between GPUs of one host: map the peer's memory by CUDA IPC and copy pages out of it.

A peer's life here: known from `attach` to `detach`, mapped when its first copy begins and unmapped after its last. One
thread copies, the copy with the least left first, block by block on a stream of its own; two blocks are under way, so
that the GPU fills one while the other is verified. Nothing foreign writes into our pages: only that stream does, and a
copy is answered only when all its blocks' events have come. A copy that is stopped ends so too.

Work that was given to a GPU cannot be taken back. When a block's event does not come within `piece_s`, later copies are
refused at once, and the one at hand stays unanswered, its pages not given back, until the event comes or the process is
ended; `close` says so by its `TimeoutError`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from protocol.handshake import RegionTicket
from transfer.copy_crew import CopyCrew
from transfer.cuda.door import DoorAddress, read_address
from transfer.cuda.landing import DeviceLanding
from transfer.cuda.library import CudaError
from transfer.cuda.stream import Block, PageStream
from transfer.faults import InjectedFault
from transfer.io_loop import IoLoop
from transfer.jobs import PageCopy, Peer
from transfer.landing import CopyStopped, LandingError
from transfer.memory import host_id
from transfer.spans import blocks, coalesce
from transfer.transport import TransferTimings

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class _Known:
    """A peer as this transport knows it. Guarded by the transport's lock."""

    address: DoorAddress
    mapped: int | None = None
    running: int = 0
    detached: bool = False
    retry_at: float = float("-inf")
    error: str = ""


class CudaTransport:
    """Implements `transport.Transport` for peers with a `CudaDoor` on this host."""

    name = "cuda"
    takes_grains = False

    def __init__(
        self,
        loop: IoLoop,
        landing: DeviceLanding,
        *,
        clock: Callable[[], float],
        timings: TransferTimings,
    ) -> None:
        self._loop = loop
        self._landing = landing
        self._cuda = landing.memory.cuda
        self._clock = clock
        self._timings = timings
        self._host_id = host_id()
        self._lock = threading.Lock()  # guards the peers; taken before the crew's own
        self._peers: dict[Peer, _Known] = {}
        self._stream = PageStream(landing.memory, page_bytes=landing.page_bytes, clock=clock, late_s=timings.piece_s)
        self._crew = CopyCrew(num_threads=1, work=self._work)

    def reaches(self, ticket: RegionTicket) -> bool:
        return ticket.host_id == self._host_id and read_address(ticket) is not None

    def attach(self, peer: Peer) -> None:
        address = read_address(peer.ticket)
        if address is not None:
            with self._lock:
                self._peers[peer] = _Known(address=address)

    def start(self, copy: PageCopy) -> None:
        with self._lock:
            known = self._peers.get(copy.peer)
            if copy.stop_requested or known is None:
                error = "stopped"
            elif self._stream.hung or self._clock() < known.retry_at:
                error = self._stream.hung or known.error
            else:
                self._crew.push(copy)
                return
        self._end_soon(copy, error)

    def stop(self, copy: PageCopy) -> None:
        copy.stop_requested = True
        if self._crew.remove(copy):  # else running, and about to see the flag; or ended; or not started yet
            self._end_soon(copy, "stopped")

    def detach(self, peer: Peer) -> None:
        with self._lock:
            known = self._peers.pop(peer, None)
            if known is None:
                return
            known.detached = True
            mapped = self._take_unused(known)
        self._loop.call_soon(lambda: self._unmap(mapped))

    def close(self, *, timeout_s: float) -> None:
        self._crew.close(timeout_s=timeout_s)
        for peer in list(self._peers):
            self.detach(peer)
        self._stream.close()

    # ---- copying, in the crew's thread --------------------------------------------------------------------

    def _work(self, copy: PageCopy) -> None:
        with self._lock:
            known = self._peers.get(copy.peer)
            if known is not None:
                known.running += 1
        if known is None:
            copy.on_ended(copy, "detached")
            return
        error: str | None = None
        yielded = False
        try:
            yielded = self._copy(copy, self._map(known))
        except (CopyStopped, InjectedFault, LandingError, CudaError) as failure:
            error = str(failure)
        except Exception as failure:  # a bug; the job must be answered all the same, and the thread live on
            logger.exception("copying pages failed")
            error = f"copying pages failed: {failure!r}"
        with self._lock:
            known.running -= 1
            if yielded and not copy.stop_requested and not known.detached:
                self._crew.push(copy)
                return
            mapped = self._take_unused(known)
        copy.on_ended(copy, "stopped" if yielded else error)
        self._unmap(mapped)

    def _map(self, known: _Known) -> int:
        """The address of the peer's memory. Raises `CudaError`, which holds for `retry_s`."""
        if known.mapped is None:
            try:
                if known.address.gpu not in self._cuda.visible_gpus():
                    raise CudaError(
                        f"the peer's GPU {known.address.gpu} is hidden from this process; start every node's Ray with "
                        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1"
                    )
                known.mapped = self._cuda.open(bytes.fromhex(known.address.handle))
            except CudaError as error:
                known.error = f"the peer's memory cannot be mapped: {error}"
                known.retry_at = self._clock() + self._timings.retry_s
                raise CudaError(known.error) from error
        return known.mapped

    def _copy(self, copy: PageCopy, source: int) -> bool:
        """Copy what is left of `copy`; True when it gave way to a shorter one before its end."""
        if copy.started_at is None:
            copy.started_at = self._clock()
        job, done, stream = copy.job, copy.done_pages, self._stream
        verified = any(job.checksums)
        under_way: deque[Block] = deque()
        try:
            spans = coalesce(job.source_pages[done:], job.target_pages[done:])
            for pages in blocks(spans, max_pages=stream.block_pages(verified=verified)):
                if not stream.has_room:
                    self._land(copy, under_way, verified=verified)
                if copy.stop_requested:
                    raise CopyStopped("stopped")
                if self._crew.should_yield(copy):
                    break
                self._landing.before(copy, self.name)
                stream.begin(source, pages, under_way, verified=verified)
            while under_way:
                self._land(copy, under_way, verified=verified)
        finally:
            while under_way:  # whatever went wrong, what was begun lands, and only then it is over
                stream.landed(under_way)
        return copy.done_pages < copy.num_pages

    def _land(self, copy: PageCopy, under_way: deque[Block], *, verified: bool) -> None:
        """Wait for the oldest block, verify and count it."""
        block = self._stream.landed(under_way)
        self._landing.landed(copy, self.name, block.num_pages, self._stream.seen(block) if verified else None)

    # ---- bookkeeping --------------------------------------------------------------------------------------

    def _take_unused(self, known: _Known) -> int | None:
        """The mapping of a detached peer that no copy reads any more, to be closed outside the lock."""
        if not known.detached or known.running:
            return None
        mapped, known.mapped = known.mapped, None
        return mapped

    def _unmap(self, mapped: int | None) -> None:
        if mapped is not None:
            try:
                self._cuda.close(mapped)
            except CudaError as error:
                logger.warning("a peer's memory cannot be unmapped: %s", error)

    def _end_soon(self, copy: PageCopy, error: str) -> None:
        self._loop.call_soon(lambda: copy.on_ended(copy, error))
