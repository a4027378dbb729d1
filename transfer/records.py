"""The fetcher's books: one record per job that is not answered yet, and the states it goes through."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from transfer.io_loop import Timer
from transfer.jobs import FetchJob, OnDone, PageCopy, Peer
from transfer.transport import Transport


class JobState(enum.Enum):
    COPYING = "copying"
    """One transport after the other has it: waiting for its turn, or being written."""
    STOPPING = "stopping"
    """The transport was asked to end it; bytes may still land."""
    DONE = "done"


_LEGAL = {
    JobState.COPYING: {JobState.STOPPING, JobState.DONE},
    JobState.STOPPING: {JobState.DONE},
    JobState.DONE: set[JobState](),
}


class StopReason(enum.Enum):
    """Why a copy was asked to end; the value completes the sentence "the fetch ended because ..."."""

    CANCELLED = "it was cancelled"
    DEADLINE = "its deadline passed"
    DETACHED = "its peer was detached"
    CLOSED = "the fetcher was closed"


@dataclass(kw_only=True, eq=False)
class JobRecord:
    """A job's entry in the fetcher's books."""

    job: FetchJob
    peer: Peer | None
    """None when it was not attached."""
    on_done: OnDone
    fetched_at: float
    state: JobState = JobState.COPYING
    copy: PageCopy | None = None
    """The attempt at hand, or the last one."""
    transport: Transport | None = None
    """That attempt's."""
    paths: list[Transport] = field(default_factory=list)
    """To be tried after it."""
    timer: Timer | None = None
    errors: list[str] = field(default_factory=list)
    stop_reason: StopReason | None = None

    def move_to(self, state: JobState) -> None:
        """Raises `AssertionError` for a move that the table does not have."""
        assert state in _LEGAL[self.state], f"a fetch cannot go from {self.state.value} to {state.value}"
        self.state = state
