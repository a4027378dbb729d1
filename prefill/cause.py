"""Why a move of a prefill half is made: the event and what came with it."""

from __future__ import annotations

from dataclasses import dataclass

from prefill.rooms import PrefillRoom
from prefill.table import PREFILL_ENDINGS, PrefillEvent
from protocol.rooms import Abort, AbortReason, Message, Room


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a move is made."""

    event: PrefillEvent
    room: Room
    record: PrefillRoom | None
    """The room, if it was live when the event came."""
    link: str
    message: Message | None
    detail: str

    @property
    def reason(self) -> AbortReason | None:
        """Why the room ends, in the words of an `Abort`; None when it ends as it should."""
        if isinstance(self.message, Abort):
            return self.message.reason
        ending = PREFILL_ENDINGS.get(self.event)
        return None if ending is None else ending.reason

    @property
    def live(self) -> PrefillRoom:
        """The room, for actions that the table only has for live ones."""
        assert self.record is not None, f"{self.event.name} acted on {self.room}, which is not live"
        return self.record
