"""The world as a decode half reaches it: the engine, the transfer layer, links, clocks. Made once by its owner."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from decode.counters import DecodeStage
from engine.engine import Engine
from engine.grammar.constraint import Constraint
from protocol.rooms import Message, PeerAddress, Room, TokenEvent
from transfer.jobs import FetchJob, FetchResult

JobKey = tuple[Room, int]
"""A copy's key: its room, and which of the room's copies it is."""


class Fetcher(Protocol):
    """What a decode half asks of the transfer layer."""

    def fetch(self, job: FetchJob, on_done: Callable[[FetchResult], None]) -> None:
        """Begin a copy. `on_done` is called once, on any thread, when nothing of it can land any more."""

    def cancel(self, key: JobKey) -> None:
        """Ask a copy to end soon; `on_done` tells when it has."""


@dataclass(frozen=True, kw_only=True)
class DecodePorts:
    """The world as a decode half reaches it."""

    engine: Engine
    fetcher: Fetcher
    on_fetched: Callable[[FetchResult], None]
    """Brings a result from the transfer layer's thread to `DecodeHalf.fetched` on the engine thread."""
    connect: Callable[[PeerAddress], str]
    """The id of a new link; messages for it wait until it is up, and its loss is reported if it never is."""
    send: Callable[[str, Message], None]
    """(link, message)."""
    emit: Callable[[str, TokenEvent], None]
    """(router's link, token)."""
    constrain: Callable[[Room], Constraint | None] = lambda room: None
    """The place in its grammar of a room that is being opened, if its job has one."""
    clock: Callable[[], float] = time.monotonic
    """Seconds that only ever grow; the fetcher's clock."""
    unix_time: Callable[[], float] = time.time
    observe: Callable[[DecodeStage, float], None] = lambda stage, seconds: None
    """Told how many seconds a stage took."""
