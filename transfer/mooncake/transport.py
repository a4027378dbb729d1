"""Transport over mooncake-transfer-engine: peers' pages come into a bounce memory, and from there into their places.

`__init__.py` says why. A peer's life here: it is known from `attach` to `detach`, and left alone for `retry_s` after a
read from it failed (its copies then go another way at once). Copies run in a few threads of our own, the one with the
least left first; each keeps some blocks under way, so that the library reads while we verify, also on a machine where
either of us waits for a core. A stopped copy ends at the next turn of its thread, whatever the library is doing: only
that thread writes into its pages. Pages without checksums are asked for along with the identity of their door.

The library's TCP takes as long for a request as for a quarter of a megabyte, so copies of many shorter runs of pages go
another way at once: our own TCP packs them at both ends. RDMA has no such price.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from protocol.handshake import RegionTicket
from transfer.copy_crew import CopyCrew
from transfer.faults import InjectedFault
from transfer.io_loop import IoLoop
from transfer.jobs import PageCopy, Peer
from transfer.landing import CopyStopped, Landing, LandingError
from transfer.mooncake.bounce import Block, Bounce
from transfer.mooncake.lives import Lives, ReadFailed
from transfer.mooncake.messages import MAX_SPANS, DoorAddress
from transfer.page_run import PageRun
from transfer.spans import Span, blocks, runs
from transfer.transport import TransferTimings

logger = logging.getLogger(__name__)

_NUM_THREADS = 4
"""They wait for the library most of the time: one that waits for a hung peer leaves the others."""
_DEPTH = 4
"""Blocks under way. On two cores that ten processes wanted, copies of 64 MB reached about 75% of the library's own
speed with two, and 90% to 105% with four."""
_SPARE_SLOTS = 4
"""For the blocks of copies that were stopped, until the library is through with them."""
_BLOCK_BYTES = 2 << 20
_SHORT_RUN_BYTES = 256 << 10
_BLOCK_S = 6.0
"""A block that takes longer has failed: its peer hangs, for all we know."""


@dataclass(kw_only=True, eq=False)
class _Known:
    """A peer as this transport knows it."""

    address: DoorAddress
    retry_at: float = float("-inf")
    error: str = ""


class MooncakeTransport:
    """Implements `transport.Transport` for peers with a door of this name and our protocol. The constructor waits until
    the library runs; raises `MooncakeUnavailable` where it cannot."""

    name = "mooncake"
    takes_grains = False

    def __init__(
        self,
        loop: IoLoop,
        landing: Landing,
        *,
        ib_device: str,
        clock: Callable[[], float],
        timings: TransferTimings,
    ) -> None:
        self._loop = loop
        self._landing = landing
        self._ib_device = ib_device
        self._clock = clock
        self._timings = timings
        self._block_pages = max(1, min(_BLOCK_BYTES // landing.page_bytes, MAX_SPANS - 1))
        self._changed = threading.Condition(threading.RLock())  # guards all that follows; taken before the crew's own
        self._peers: dict[Peer, _Known] = {}
        self._lives = Lives(
            loop,
            ib_device=ib_device,
            num_slots=_NUM_THREADS * _DEPTH + _SPARE_SLOTS,
            block_bytes=self._block_pages * landing.page_bytes,
            changed=self._changed,
            clock=clock,
            timings=timings,
        )
        self._crew = CopyCrew(num_threads=_NUM_THREADS, work=self._work)

    @property
    def pid(self) -> int:
        """Of the library's process at present."""
        return self._lives.pid

    def reaches(self, ticket: RegionTicket) -> bool:
        return _address(ticket, rdma=bool(self._ib_device)) is not None

    def attach(self, peer: Peer) -> None:
        address = _address(peer.ticket, rdma=bool(self._ib_device))
        if address is None:
            return
        with self._changed:
            self._peers[peer] = _Known(address=address)
            self._lives.open(address)

    def start(self, copy: PageCopy) -> None:
        with self._changed:
            known = self._peers.get(copy.peer)
            if copy.stop_requested or known is None:
                error = "stopped"
            elif self._is_scattered(copy):
                error = "its pages lie too far apart for mooncake's TCP"
            elif self._clock() < known.retry_at:
                error = known.error
            else:
                self._crew.push(copy)
                return
        self._end_soon(copy, error)

    def stop(self, copy: PageCopy) -> None:
        copy.stop_requested = True
        with self._changed:
            self._changed.notify_all()
            if not self._crew.remove(copy):
                return  # running, and about to see the flag; or ended; or not started yet
        self._end_soon(copy, "stopped")

    def detach(self, peer: Peer) -> None:
        with self._changed:
            self._peers.pop(peer, None)

    def close(self, *, timeout_s: float) -> None:
        self._crew.close(timeout_s=timeout_s)
        with self._changed:
            self._peers.clear()
        self._lives.close()

    # ---- copying, in the crew's threads -------------------------------------------------------------------

    def _work(self, copy: PageCopy) -> None:
        error: str | None = None
        yielded = False
        try:
            with self._lives.lease(copy) as bounce:
                yielded = self._copy(copy, bounce)
        except (CopyStopped, InjectedFault, LandingError, ReadFailed) as failure:
            error = str(failure)
        except Exception as failure:  # a bug; the job must be answered all the same, and the thread live on
            logger.exception("copying pages failed")
            error = f"copying pages failed: {failure!r}"
        if yielded:
            with self._changed:
                if not copy.stop_requested:
                    self._crew.push(copy)
                    return
            error = "stopped"
        copy.on_ended(copy, error)

    def _copy(self, copy: PageCopy, bounce: Bounce) -> bool:
        """Copy what is left of `copy`; True when it gave way to a shorter one before its end."""
        with self._changed:
            known = self._peers.get(copy.peer)
        if known is None:
            raise CopyStopped("detached")
        if copy.started_at is None:
            copy.started_at = self._clock()
        identified = not (copy.job.checksums and all(copy.job.checksums))
        spans = [Span(first, first, count) for first, count in runs(copy.sources[copy.done_pages :]).tolist()]
        under_way: deque[Block] = deque()
        yields = False
        try:
            for pages in blocks(spans, max_pages=self._block_pages):
                if len(under_way) == _DEPTH:
                    self._land(copy, known, bounce, under_way)
                yields = self._crew.should_yield(copy)
                if yields:
                    break
                under_way.append(self._begin(copy, known, bounce, pages, identified=identified))
            while under_way:
                self._land(copy, known, bounce, under_way)
        finally:
            with self._changed:
                for block in under_way:
                    bounce.release(block)
        return yields

    def _begin(
        self, copy: PageCopy, known: _Known, bounce: Bounce, pages: Sequence[Span], *, identified: bool
    ) -> Block:
        with self._changed:
            self._lives.wait(copy, bounce, lambda: bounce.has_slot or bounce.dead, seconds=_BLOCK_S)
            if bounce.dead:
                raise ReadFailed(bounce.error)
            return bounce.begin(known.address, pages, copy.page_bytes, identified=identified)

    def _land(self, copy: PageCopy, known: _Known, bounce: Bounce, under_way: deque[Block]) -> None:
        """Bring the oldest block to its pages, when it is there."""
        block = under_way[0]
        with self._changed:
            try:
                self._lives.wait(copy, bounce, lambda: block.done, seconds=_BLOCK_S)
                if block.error is not None:
                    raise ReadFailed(block.error)
            except ReadFailed as failure:
                known.error, known.retry_at = str(failure), self._clock() + self._timings.retry_s
                raise
        landed = bounce.landed(block)
        if block.identified and bytes(landed[block.nbytes :]) != bytes.fromhex(known.address.identity):
            raise ReadFailed("another life of the peer's door answered; its ticket is out of date")
        pages = np.arange(block.nbytes // copy.page_bytes)
        run = PageRun(self._landing, copy, landed[: block.nbytes], pages, transport=self.name)
        while run.left:
            if copy.stop_requested:
                raise CopyStopped("stopped")
            run.step()
        del run, landed
        with self._changed:
            bounce.release(under_way.popleft())

    def _is_scattered(self, copy: PageCopy) -> bool:
        breaks = len(runs(copy.sources)) - 1
        return not self._ib_device and copy.total_bytes < _SHORT_RUN_BYTES * breaks

    def _end_soon(self, copy: PageCopy, error: str) -> None:
        self._loop.call_soon(lambda: copy.on_ended(copy, error))


def _address(ticket: RegionTicket, *, rdma: bool) -> DoorAddress | None:
    """Where a peer's door is; None when it has none that speaks our protocol."""
    try:
        address = msgspec.json.decode(ticket.doors.get("mooncake", ""), type=DoorAddress)
        bytes.fromhex(address.identity)
    except ValueError:  # a ticket from a replica of another version is no reason to fail
        return None
    return address if address.protocol == ("rdma" if rdma else "tcp") else None
