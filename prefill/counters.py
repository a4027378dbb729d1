"""What a prefill half counts: read by the metrics export and by tests, written by the half alone."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field

from protocol.answers import MessageCounters
from protocol.rooms import AbortReason, FailureCode


class PrefillStage(enum.Enum):
    """A stretch of a room's life; each is reported once, in seconds, when it is over."""

    QUEUED = "queued"
    """From the open until the room was let into the engine."""
    FIRST_TOKEN = "first_token"
    """From the open until the first token."""
    RETAINED = "retained"
    """From the first token until decode had every page."""


@dataclass
class PrefillCounters:
    """Since the half was made."""

    messages: MessageCounters
    opened: int = 0
    delivered: int = 0
    """Rooms whose pages decode took and verified."""
    finished_early: int = 0
    offered_pages: int = 0
    aborts: Counter[AbortReason] = field(default_factory=Counter)
    """Rooms ended by an `Abort`, by its reason."""
    failures: Counter[FailureCode] = field(default_factory=Counter)
    """Rooms given up here, by what the router was told."""
