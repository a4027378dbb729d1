"""Why a half makes a move: the event and what came with it. Made for each move, read by its actions."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Generic, TypeVar

from protocol.endings import Ending
from protocol.rooms import Abort, AbortReason, Message, Room

E = TypeVar("E", bound=enum.Enum)
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Cause(Generic[E, R]):
    """Of a half with events `E`, whose live rooms have records `R`."""

    event: E
    room: Room
    record: R | None
    """The room, if it was live when the event came."""
    link: str
    message: Message | None
    detail: str
    ending: Ending | None
    """What the half's table of endings has for the event."""

    @property
    def reason(self) -> AbortReason | None:
        """Why the room ends, in the words of an `Abort`; None when it ends as it should."""
        if isinstance(self.message, Abort):
            return self.message.reason
        return None if self.ending is None else self.ending.reason

    @property
    def live(self) -> R:
        """The room, for actions that the table only has for live ones."""
        assert self.record is not None, f"{self.event.name} acted on {self.room}, which is not live"
        return self.record
