"""What a decode half counts: read by the metrics export and by tests, written by the half alone."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field

from protocol.answers import MessageCounters
from protocol.rooms import AbortReason, FailureCode


class DecodeStage(enum.Enum):
    """A stretch of a room's life; reported in seconds when it is over."""

    RESERVE_WAIT = "reserve_wait"
    """From the open until pages were granted."""
    TRANSFER_QUEUED = "transfer_queued"
    """Of one copy: from its request until its first byte."""
    TRANSFER = "transfer"
    """Of one copy: from its first to its last byte."""
    RECEIVING = "receiving"
    """From the grant until every page and the handoff were here."""
    HANDOVER = "handover"
    """From the end of prefill's computation until the request was admitted here (two machines' clocks)."""


@dataclass
class DecodeCounters:
    """Since the half was made."""

    messages: MessageCounters
    opened: int = 0
    """By `OpenDecode`."""
    generating: int = 0
    """By `OpenGenerate`."""
    granted: int = 0
    revocations: int = 0
    fetches: int = 0
    fetch_failures: int = 0
    """Copies that failed, cancelled ones not counted."""
    fetched_pages: int = 0
    fetched_bytes: int = 0
    held_pages: int = 0
    """Pages that needed no transfer, because the prefix cache had them."""
    admitted: int = 0
    finished: int = 0
    aborts: Counter[AbortReason] = field(default_factory=Counter)
    """Rooms ended by an `Abort`, by its reason."""
    failures: Counter[FailureCode] = field(default_factory=Counter)
    """Rooms given up here, by what the router was told."""
