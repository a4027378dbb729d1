"""What only moves of a decode half have beside `protocol.cause`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from decode.rooms import DecodeRoom
from decode.table import DecodeEvent
from protocol.cause import Cause


class EngineRefused(Exception):
    """The engine would not take or admit a request; `event` is what that means for its room."""

    def __init__(self, event: DecodeEvent, why: str) -> None:
        super().__init__(why)
        self.event = event


@dataclass(frozen=True, slots=True)
class DecodeCause(Cause[DecodeEvent, DecodeRoom]):
    """Why a move is made."""

    pages: Sequence[int]
    """Prompt pages that landed."""
