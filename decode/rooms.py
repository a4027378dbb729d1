"""One live decode half: what is known of its room between messages. The states it goes through are in `table.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from decode.intake import PageIntake
from decode.table import DecodeState
from decode.timeline import DecodeTimeline
from engine.outputs import TokenOutput
from engine.request import Request
from protocol.rooms import Handoff, Message, Offer, PeerAddress, Room


@dataclass(slots=True)
class DecodeRoom:
    """One live decode half. Owned by its `DecodeHalf`, and changed by that and its parts alone."""

    room: Room
    router: str
    """Link of the router that opened it."""
    request: Request
    intake: PageIntake
    opened_at: float
    queued_at: float
    """When it began to wait for pages; later than the open for one whose reservation was revoked."""
    deadline: float
    state: DecodeState
    address: PeerAddress | None
    """The prefill replica; None for a room that generates from the start."""
    prefill: str | None = None
    """Link to the prefill half; None once its part is over."""
    handoff: Handoff | None = None
    granted_at: float = 0.0
    progress_at: float = 0.0
    """When pages were granted or last came."""
    jobs: dict[int, list[int]] = field(default_factory=dict)
    """Copies running, by number: what each brings, as the intake counts it."""
    num_jobs: int = 0
    """Copies ever begun: the next one's number."""
    output: TokenOutput | None = None
    """The newest token."""
    owed: list[str] = field(default_factory=list)
    """Links whose abort is to be acknowledged when the pages are drained."""
    timeline: DecodeTimeline | None = None
    """None unless its router asked for one."""

    @property
    def is_complete(self) -> bool:
        """Whether generation can go on here."""
        return self.handoff is not None and self.intake.is_complete

    @property
    def is_landing(self) -> bool:
        """Whether only copies that run are missing."""
        if self.state is not DecodeState.RECEIVING or self.handoff is None:
            return False
        return sum(map(len, self.jobs.values())) == self.intake.num_missing

    def misfit(self, message: Message) -> str:
        """What is wrong with an offer or a handoff, if the room still waits for one; empty when nothing is."""
        if self.state not in (DecodeState.QUEUED, DecodeState.RECEIVING):
            return ""
        if isinstance(message, Offer):
            return self.intake.misfit(message)
        expected = (self.intake.num_pages, self.request.num_generated)
        if isinstance(message, Handoff) and (message.num_pages, message.position) != expected:
            return (
                f"a handoff of {message.num_pages} pages at position {message.position} came to a room of "
                f"{expected[0]} pages at position {expected[1]}"
            )
        return ""
