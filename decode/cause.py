"""Why a move of a decode half is made: the event and what came with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from decode.rooms import DecodeRoom
from decode.table import DECODE_ENDINGS, DecodeEvent
from protocol.rooms import Abort, AbortReason, Message, Room


class EngineRefused(Exception):
    """The engine would not take or admit a request; `event` is what that means for its room."""

    def __init__(self, event: DecodeEvent, why: str) -> None:
        super().__init__(why)
        self.event = event


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a move is made."""

    event: DecodeEvent
    room: Room
    record: DecodeRoom | None
    """The room, if it was live when the event came."""
    link: str
    message: Message | None
    detail: str
    pages: Sequence[int]
    """Prompt pages that landed."""

    @property
    def reason(self) -> AbortReason | None:
        """Why the room ends, in the words of an `Abort`; None when it ends as it should."""
        if isinstance(self.message, Abort):
            return self.message.reason
        ending = DECODE_ENDINGS.get(self.event)
        return None if ending is None else ending.reason

    @property
    def live(self) -> DecodeRoom:
        """The room, for actions that the table only has for live ones."""
        assert self.record is not None, f"{self.event.name} acted on {self.room}, which is not live"
        return self.record
