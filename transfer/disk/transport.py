"""Transport by way of a shared folder: look up a page's checksum in the peer's index, read it out of its pack.

A copy here is queued, running or asleep. It sleeps when its next page is not in the index, which happens because an
offer can be quicker than the writing of what it offers; it looks again soon, and less often the longer it waits. It
fails when the page was refused, or when nothing has come for `_PATIENCE_S`; those that follow then fail sooner, so that
a folder that went away costs one request a pause, not each. Copies run in a few threads of our own, which also read the
index; the fetcher's loop only wakes sleepers, so a folder that hangs holds up nothing but the copies out of folders.
Such a copy cannot be ended before the system lets go of it: stop is honoured between pieces.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from protocol.handshake import RegionTicket
from transfer.copy_crew import CopyCrew
from transfer.disk.folders import is_spool_name
from transfer.disk.shelf import OpenPacks, PackGone, Shelf
from transfer.faults import InjectedFault
from transfer.io_loop import IoLoop, Timer
from transfer.jobs import PageCopy, Peer
from transfer.landing import CopyStopped, Landing, LandingError

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_BLOCK_PAGES = 256
_PATIENCE_S = 10.0
_DOUBTFUL_S = 0.5
"""In the place of that, out of a folder for which it has run out, until something comes of there again."""
_REFUSED_S = 0.2
"""A refusal counts after this long: it may be an old one, of a page that was offered again since."""
_FIRST_NAP_S = 0.001
_LONGEST_NAP_S = 0.05


class _Outcome(enum.Enum):
    LANDED = enum.auto()
    YIELDED = enum.auto()
    """To a shorter copy."""
    MISSING = enum.auto()
    """The next page is not there."""


@dataclass(kw_only=True, eq=False)
class _Wait:
    """Since when a copy has been waiting for a page, and what wakes it."""

    page: int
    since: float
    looked_at: float = 0.0
    timer: Timer | None = None


class DiskTransport:
    """Implements `transport.Transport` for peers that keep a spool in `folder`, wherever that is mounted for them."""

    name = "disk"
    takes_grains = False

    def __init__(
        self, loop: IoLoop, landing: Landing, *, folder: Path, num_threads: int, clock: Callable[[], float]
    ) -> None:
        self._loop = loop
        self._landing = landing
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows; taken before the crew's own
        self._shelves: dict[Peer, Shelf] = {}
        self._waits: dict[PageCopy, _Wait] = {}
        self._crew = CopyCrew(num_threads=num_threads, work=self._work)

    def reaches(self, ticket: RegionTicket) -> bool:
        return is_spool_name(ticket.doors.get(self.name, ""))

    def attach(self, peer: Peer) -> None:
        with self._lock:
            self._shelves[peer] = self._new_shelf(peer)  # attached again, its folder has moved

    def start(self, copy: PageCopy) -> None:
        error = "stopped"
        with self._lock:
            if not copy.stop_requested:
                if all(copy.job.checksums) and copy.job.checksums:
                    self._shelf(copy.peer)
                    self._crew.push(copy)
                    return
                error = "pages come out of a folder by their checksums; turn them on in every replica"
        self._end_soon(copy, error)

    def stop(self, copy: PageCopy) -> None:
        copy.stop_requested = True
        with self._lock:
            wait = self._waits.get(copy)
            if wait is not None and wait.timer is not None:
                wait.timer.cancel()
                del self._waits[copy]
                error = f"stopped while waiting for page {wait.page} to be written"
            elif self._crew.remove(copy):
                self._waits.pop(copy, None)
                error = "stopped"
            else:
                return  # running, and about to see the flag; or ended; or not started yet
        self._end_soon(copy, error)

    def detach(self, peer: Peer) -> None:
        with self._lock:
            self._shelves.pop(peer, None)

    def close(self, *, timeout_s: float) -> None:
        self._crew.close(timeout_s=timeout_s)

    # ---- copying, in the crew's threads -------------------------------------------------------------------

    def _work(self, copy: PageCopy) -> None:
        error: str | None = None
        outcome = _Outcome.LANDED
        with self._lock:
            shelf = self._shelves.get(copy.peer)
        try:
            if shelf is None:
                raise CopyStopped("detached")
            outcome = self._copy(copy, shelf)
        except (CopyStopped, InjectedFault, LandingError) as failure:
            error = str(failure)
        except OSError as failure:
            error = f"the folder of the peer cannot be read: {failure}"
        except Exception as failure:  # a bug; the job must be answered all the same, and the thread live on
            logger.exception("reading pages failed")
            error = f"reading pages failed: {failure!r}"
        self._worked(copy, shelf, outcome, error)

    def _copy(self, copy: PageCopy, shelf: Shelf) -> _Outcome:
        """Read what is left of `copy`, as far as it is there."""
        with shelf.opened() as packs:
            while copy.done_pages < copy.num_pages:
                if copy.stop_requested:
                    raise CopyStopped("stopped")
                if self._crew.should_yield(copy):
                    return _Outcome.YIELDED
                try:
                    if not self._copy_block(copy, shelf, packs):
                        return _Outcome.MISSING
                except PackGone as gone:
                    shelf.forget(gone.pack)
                    return _Outcome.MISSING
        return _Outcome.LANDED

    def _copy_block(self, copy: PageCopy, shelf: Shelf, packs: OpenPacks) -> bool:
        """Read the next pages, as far as they are there; False when not one is."""
        job, size = copy.job, copy.page_bytes
        block = slice(copy.done_pages, copy.done_pages + max(1, min(_BLOCK_BYTES // size, _BLOCK_PAGES)))
        places = shelf.find(job.checksums[block])
        if not places:
            return False
        if copy.started_at is None:
            copy.started_at = self._clock()
        self._landing.before(copy, self.name)
        packs.read(places, self._landing.bytes, copy.targets[block][: len(places)] * size, size)
        shelf.is_doubtful = False
        self._landing.landed(copy, self.name, len(places))
        return True

    def _worked(self, copy: PageCopy, shelf: Shelf | None, outcome: _Outcome, error: str | None) -> None:
        if outcome is _Outcome.MISSING and shelf is not None:
            error = self._given_up(copy, shelf)
        with self._lock:
            if error is None and outcome is not _Outcome.LANDED:
                if not copy.stop_requested and copy.peer in self._shelves:
                    self._again(copy, outcome)
                    return
                error = "stopped"
            self._waits.pop(copy, None)
        copy.on_ended(copy, error)

    def _given_up(self, copy: PageCopy, shelf: Shelf) -> str | None:
        """Why `copy` need not wait for its next page any longer; None when it should."""
        now, page = self._clock(), copy.job.source_pages[copy.done_pages]
        with self._lock:
            wait = self._waits.get(copy)
            if wait is None or wait.page != page:
                wait = self._waits[copy] = _Wait(page=page, since=now)
            wait.looked_at = now
        waited = now - wait.since
        refusal = shelf.refusal(copy.job.checksums[copy.done_pages])
        if refusal is not None and waited >= _REFUSED_S:
            return f"page {page} was not written: {refusal.words}"
        if waited >= (_DOUBTFUL_S if shelf.is_doubtful else _PATIENCE_S):
            shelf.is_doubtful = True
            return f"page {page} did not come within {waited:.1f} s; {shelf.state()}"
        return None

    # ---- bookkeeping, under the lock ----------------------------------------------------------------------

    def _again(self, copy: PageCopy, outcome: _Outcome) -> None:
        """Put `copy` back in the queue: at once, or when its page may be there."""
        if outcome is _Outcome.YIELDED:
            self._crew.push(copy)
            return
        wait = self._waits[copy]
        nap = min(max((wait.looked_at - wait.since) / 4, _FIRST_NAP_S), _LONGEST_NAP_S)
        wait.timer = self._loop.call_at(wait.looked_at + nap, lambda: self._wake(copy, wait))

    def _wake(self, copy: PageCopy, wait: _Wait) -> None:
        with self._lock:
            if self._waits.get(copy) is wait and wait.timer is not None:
                wait.timer = None
                self._crew.push(copy)

    def _shelf(self, peer: Peer) -> Shelf:
        return self._shelves.setdefault(peer, self._new_shelf(peer))

    def _new_shelf(self, peer: Peer) -> Shelf:
        return Shelf(self._folder / peer.ticket.doors[self.name])

    def _end_soon(self, copy: PageCopy, error: str) -> None:
        self._loop.call_soon(lambda: copy.on_ended(copy, error))
