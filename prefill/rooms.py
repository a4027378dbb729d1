"""One live prefill half: what is known of its room between messages. The states it goes through are in `table.py`."""

from __future__ import annotations

from dataclasses import dataclass

from engine.outputs import TokenOutput
from engine.request import Request
from prefill.table import PrefillState
from prefill.timeline import PrefillTimeline
from protocol.rooms import Room


@dataclass(slots=True)
class PrefillRoom:
    """One live prefill half. Owned by its `PrefillHalf`, and changed by that and its parts alone."""

    room: Room
    router: str
    """Link of the router that opened it."""
    request: Request
    num_pages: int
    """Pages of prompt and logged tokens."""
    hands_over: bool
    """False when the first token is the only one, so that there is no decode half."""
    opened_at: float
    deadline: float
    state: PrefillState = PrefillState.WAITING
    decode: str | None = None
    """Link of the decode half, once it has joined."""
    grain: int = 0
    """Tokens to a checksum, as it asked; 0 is one for each page."""
    reserved: bool = False
    held_pages: int = 0
    """Leading pages that decode has in its prefix cache."""
    offered: range = range(0)
    """Pages offered over the bound link."""
    first: TokenOutput | None = None
    """The first token, once sampled."""
    computed_at: float = 0.0
    """Unix time of the first token."""
    retained_at: float = 0.0
    timeline: PrefillTimeline | None = None
    """None unless its router asked for one."""

    @property
    def waits_for_reservation(self) -> bool:
        """Whether its pages count as computed ahead of decode."""
        return self.hands_over and not self.reserved
