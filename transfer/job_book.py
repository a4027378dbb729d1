"""The fetcher's jobs on their way: given to one transport after the other, stopped, and answered once.

A record is in the book from `add` until its answer. `lock` guards the book and whatever else must not change between a
look into it and an entry; it is never held while copying or calling back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable

from transfer.io_loop import IoLoop
from transfer.jobs import FetchJob, FetchResult, OnDone, PageCopy, Peer
from transfer.our_pool import OurPool
from transfer.records import JobRecord, JobState, StopReason
from transfer.spans import Pages
from transfer.transport import Transport

logger = logging.getLogger(__name__)


class JobBook:
    """Answers come in the thread of `loop` or of a transport."""

    def __init__(self, loop: IoLoop, pool: OurPool, *, clock: Callable[[], float]) -> None:
        self.lock = threading.Condition()
        self._loop = loop
        self._pool = pool
        self._clock = clock
        self._records: dict[Hashable, JobRecord] = {}
        self._unanswered = 0  # jobs whose on_done has not returned yet

    @property
    def num_unanswered(self) -> int:
        """Jobs whose `on_done` has not returned yet."""
        with self.lock:
            return self._unanswered

    def find(self, key: Hashable) -> JobRecord | None:
        """The job of this name that is not answered yet."""
        with self.lock:
            return self._records.get(key)

    def records(self, *, of: Peer | None = None) -> list[JobRecord]:
        """All jobs that are not answered yet, or those from one peer."""
        with self.lock:
            return [record for record in self._records.values() if of is None or record.peer is of]

    def wait_empty(self, timeout_s: float) -> bool:
        """Whether all jobs were answered in time."""
        with self.lock:
            return self.lock.wait_for(lambda: self._unanswered == 0, timeout_s)

    def add(self, job: FetchJob, peer: Peer | None, on_done: OnDone) -> JobRecord:
        """Enter a job whose key is free."""
        record = JobRecord(job=job, peer=peer, on_done=on_done, fetched_at=self._clock())
        with self.lock:
            assert job.key not in self._records
            self._records[job.key] = record
            self._unanswered += 1
        return record

    def answer(self, record: JobRecord, *, error: str | None) -> None:
        """Answer a job that needs no copy, soon: with success when there is no error."""
        if error is not None:
            record.errors.append(error)
        self._loop.call_soon(lambda: self._finish(record, ok=error is None))

    def begin(self, record: JobRecord, sources: Pages, targets: Pages, paths: list[Transport]) -> None:
        """Have the transports `paths` try the job in turn, until its deadline; its pages have been checked."""
        record.paths = paths
        deadline = record.job.deadline
        if deadline != float("inf"):
            record.timer = self._loop.call_at(deadline, lambda: self.stop(record, StopReason.DEADLINE))
        self._attempt(record, sources, targets)

    def stop(self, record: JobRecord, reason: StopReason) -> None:
        """Ask a job to end soon, if nobody has yet."""
        with self.lock:
            if record.state is not JobState.COPYING:
                return
            record.move_to(JobState.STOPPING)
            record.stop_reason = reason
            copy, transport = record.copy, record.transport
        if copy is not None and transport is not None:
            transport.stop(copy)

    # ---- inner workings -----------------------------------------------------------------------------------

    def _attempt(self, record: JobRecord, sources: Pages, targets: Pages) -> None:
        """Give the job to the next transport."""
        assert record.peer is not None
        with self.lock:
            transport = record.paths.pop(0)
            copy = PageCopy(
                job=record.job,
                peer=record.peer,
                sources=sources,
                targets=targets,
                page_bytes=self._pool.unit_bytes(record.peer.cut),
                queued_at=record.fetched_at,
                on_ended=lambda copy, error: self._ended(record, transport, copy, error),
                stop_requested=record.state is JobState.STOPPING,
            )
            record.copy, record.transport = copy, transport
        transport.start(copy)

    def _ended(self, record: JobRecord, transport: Transport, copy: PageCopy, error: str | None) -> None:
        """A transport has finished with its copy, in one of its threads."""
        if error is None:
            self._finish(record, ok=True)
            return
        with self.lock:
            record.errors.append(f"{transport.name}: {error}")
            again = record.state is JobState.COPYING and bool(record.paths)
        if again:
            self._attempt(record, copy.sources, copy.targets)
        else:
            self._finish(record, ok=False)

    def _finish(self, record: JobRecord, *, ok: bool) -> None:
        now, copy = self._clock(), record.copy
        with self.lock:
            record.move_to(JobState.DONE)
            del self._records[record.job.key]
            record.copy = None  # which knows of the record in its turn
        if record.timer is not None:
            record.timer.cancel()
        reason = record.stop_reason
        error = "; ".join(record.errors if reason is None else [reason.value, *record.errors])
        started = now if copy is None or copy.started_at is None else copy.started_at
        result = FetchResult(
            key=record.job.key,
            peer=record.job.peer,
            ok=ok,
            error=None if ok else error,
            cancelled=not ok and reason is StopReason.CANCELLED,
            bytes=len(record.job.target_pages) * self._pool.unit_bytes(record.peer.cut if record.peer else None),
            seconds=now - started,
            queued_seconds=started - record.fetched_at,
            transport="" if record.transport is None else record.transport.name,
        )
        try:
            record.on_done(result)
        except Exception:  # the caller's bug must not end the thread that others' copies depend on
            logger.exception("on_done of fetch %r failed", record.job.key)
        with self.lock:
            self._unanswered -= 1
            self.lock.notify_all()
