"""Transport within a host: map the peer's memory read-only and copy pages out of it. One copy, no serialisation.

A peer's life here is in `mapped_peer.py`. Copies run in a few threads of our own, the one with the least left first; a
long copy stops at the next block for a shorter one, so it delays that by well under a millisecond. While none of them
is busy, a short copy is made by whoever asks for it, in less time than a thread takes to wake. A copy reads memory and
waits for nobody, so it needs no time limit: a stopped or dead peer's memory stays readable for as long as it is mapped
here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from protocol.handshake import RegionTicket
from transfer.client_handshake import ClientHandshake, Established, unix_address
from transfer.copy_crew import CopyCrew
from transfer.faults import InjectedFault
from transfer.grain_run import GrainRun
from transfer.io_loop import IoLoop
from transfer.jobs import PageCopy, Peer
from transfer.landing import CopyStopped, Landing, LandingError
from transfer.mapped_peer import MappedPeer, MappingState
from transfer.memory import PeerMemory, host_id
from transfer.page_run import PageRun
from transfer.transport import TransferTimings
from transfer.wire import Want

logger = logging.getLogger(__name__)


class ShmTransport:
    """Implements `transport.Transport` for peers with our host id."""

    name = "shm"
    takes_grains = True

    def __init__(
        self,
        loop: IoLoop,
        landing: Landing,
        *,
        secret: bytes,
        num_threads: int,
        at_once_bytes: int,
        clock: Callable[[], float],
        timings: TransferTimings,
    ) -> None:
        self._loop = loop
        self._landing = landing
        self._secret = secret
        self._at_once_bytes = at_once_bytes
        self._clock = clock
        self._timings = timings
        self._host_id = host_id()
        self._peers: dict[Peer, MappedPeer] = {}
        self._running = 0  # copies, in whatever thread
        self._at_once = False  # whether a caller makes one, or has it answered
        self._lock = threading.Lock()  # guards all that; taken before the crew's own
        self._crew = CopyCrew(num_threads=num_threads, work=self._work)

    def reaches(self, ticket: RegionTicket) -> bool:
        return bool(ticket.shm_socket) and ticket.host_id == self._host_id

    def attach(self, peer: Peer) -> None:
        with self._lock:
            entry = self._peers[peer] = MappedPeer(peer=peer)
        self._loop.call_soon(lambda: self._connect(entry))

    def start(self, copy: PageCopy) -> None:
        error, at_once = "", False
        with self._lock:
            entry = self._peers.get(copy.peer)
            if copy.stop_requested or entry is None:
                error = "stopped"
            elif entry.state is MappingState.MAPPED:
                short = copy.total_bytes <= self._at_once_bytes
                at_once = short and not (self._at_once or self._running or self._crew.has_waiting)
                if at_once:
                    self._at_once = True
                else:
                    self._crew.push(copy)
            elif entry.state is MappingState.LOST and self._clock() < entry.retry_at:
                error = entry.error
            else:
                entry.waiting.append(copy)
                if entry.state is MappingState.LOST:
                    entry.move_to(MappingState.CONNECTING)
                    self._loop.call_soon(lambda: self._connect(entry))
        if error:
            self._end_soon(copy, error)
        if at_once:
            self._work(copy)
            with self._lock:
                self._at_once = False

    def stop(self, copy: PageCopy) -> None:
        copy.stop_requested = True
        with self._lock:
            entry = self._peers.get(copy.peer)
            if entry is not None and copy in entry.waiting:
                entry.waiting.remove(copy)
            elif not self._crew.remove(copy):
                return  # running, and about to see the flag; or ended; or not started yet
        self._end_soon(copy, "stopped")

    def detach(self, peer: Peer) -> None:
        with self._lock:
            entry = self._peers.pop(peer, None)
            if entry is None:
                return
            entry.move_to(MappingState.DETACHED)
            orphans, entry.waiting = entry.waiting, []
            memory = entry.take_unused()
        for copy in orphans:
            self._end_soon(copy, "detached")
        if memory is not None:
            memory.close()
        self._loop.call_soon(lambda: self._abandon(entry))

    def close(self, *, timeout_s: float) -> None:
        self._crew.close(timeout_s=timeout_s)
        for peer in list(self._peers):
            self.detach(peer)

    # ---- the peer's memory, in the loop's thread ----------------------------------------------------------

    def _connect(self, entry: MappedPeer) -> None:
        if entry.state is not MappingState.CONNECTING:
            return
        entry.handshake = ClientHandshake(
            self._loop,
            unix_address(entry.peer.ticket.shm_socket),
            want=Want.MEMORY,
            boot=entry.peer.address.boot,
            secret=self._secret,
            clock=self._clock,
            timeout_s=self._timings.handshake_s,
            on_ready=lambda established: self._established(entry, established),
            on_failed=lambda why: self._lost(entry, why),
        )
        entry.handshake.start()

    def _abandon(self, entry: MappedPeer) -> None:
        if entry.handshake is not None:
            entry.handshake.abandon()
            entry.handshake = None

    def _established(self, entry: MappedPeer, established: Established) -> None:
        entry.handshake = None
        established.sock.close()
        ticket, welcome = entry.peer.ticket, established.welcome
        try:
            memory = PeerMemory(established.fds[0], nbytes=ticket.num_pages * ticket.page_bytes)
        except ValueError as error:
            self._lost(entry, str(error))
            return
        if (welcome.num_pages, welcome.page_bytes) != (ticket.num_pages, ticket.page_bytes):
            memory.close()
            self._lost(entry, f"the peer serves {welcome}, its ticket says {ticket}")
            return
        with self._lock:
            if entry.state is MappingState.CONNECTING:
                entry.move_to(MappingState.MAPPED)
                entry.memory, entry.source = memory, np.frombuffer(memory.view, dtype=np.uint8)
                for copy in entry.waiting:
                    self._crew.push(copy)
                entry.waiting = []
                return
        memory.close()  # detached meanwhile

    def _lost(self, entry: MappedPeer, why: str) -> None:
        with self._lock:
            entry.handshake = None
            if entry.state is not MappingState.CONNECTING:
                return
            entry.move_to(MappingState.LOST)
            entry.error = f"the peer's memory cannot be had: {why}"
            entry.retry_at = self._clock() + self._timings.retry_s
            orphans, entry.waiting = entry.waiting, []
        for copy in orphans:
            copy.on_ended(copy, entry.error)

    # ---- copying, in the crew's threads or a caller's -----------------------------------------------------

    def _work(self, copy: PageCopy) -> None:
        with self._lock:
            entry = self._peers.get(copy.peer)
            source = None if entry is None else entry.source
            if entry is not None and source is not None:
                entry.running += 1
                self._running += 1
        if entry is None or source is None:
            copy.on_ended(copy, "detached")
            return
        error: str | None = None
        yielded = False
        try:
            yielded = self._copy(copy, source)
        except (CopyStopped, InjectedFault, LandingError) as failure:
            error = str(failure)
        except Exception as failure:  # a bug; the job must be answered all the same, and the thread live on
            logger.exception("copying pages failed")
            error = f"copying pages failed: {failure!r}"
        del source  # or the memory could not be unmapped
        self._worked(copy, entry, error, yielded=yielded)

    def _copy(self, copy: PageCopy, source: npt.NDArray[np.uint8]) -> bool:
        """Copy what is left of `copy`; True when it gave way to a shorter one before its end."""
        if copy.started_at is None:
            copy.started_at = self._clock()
        run: PageRun | GrainRun
        if copy.peer.cut is not None:
            run = GrainRun(self._landing, copy, source, transport=self.name)
        else:
            run = PageRun(self._landing, copy, source, copy.sources[copy.done_pages :], transport=self.name)
        while run.left:
            if copy.stop_requested:
                raise CopyStopped("stopped")
            if self._crew.should_yield(copy):
                return True
            run.step()
        return False

    def _worked(self, copy: PageCopy, entry: MappedPeer, error: str | None, *, yielded: bool) -> None:
        with self._lock:
            entry.running -= 1
            self._running -= 1
            if yielded and entry.state is MappingState.MAPPED and not copy.stop_requested:
                self._crew.push(copy)
                return
            memory = entry.take_unused()
        copy.on_ended(copy, "stopped" if yielded else error)
        if memory is not None:
            memory.close()

    def _end_soon(self, copy: PageCopy, error: str) -> None:
        self._loop.call_soon(lambda: copy.on_ended(copy, error))
