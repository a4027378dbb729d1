"""The world as a prefill half reaches it: the engine, links, clocks. Made once by its owner."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.engine import Engine
from engine.grammar.constraint import Constraint
from prefill.counters import PrefillStage
from protocol.rooms import Message, Room, TokenEvent


@dataclass(frozen=True, kw_only=True)
class PrefillPorts:
    """The world as a prefill half reaches it."""

    engine: Engine
    checksums: Callable[[Sequence[int], int], list[int]]
    """xxh3-64 of each of the given pages of the pool, or of every so many tokens in them where that is not 0; nothing
    when verification is off."""
    send: Callable[[str, Message], None]
    """(link, message)."""
    emit: Callable[[str, TokenEvent], None]
    """(router's link, token)."""
    constrain: Callable[[Room], Constraint | None] = lambda room: None
    """The place in its grammar of a room that is being opened, if its job has one."""
    clock: Callable[[], float] = time.monotonic
    """Seconds that only ever grow."""
    unix_time: Callable[[], float] = time.time
    observe: Callable[[PrefillStage, float], None] = lambda stage, seconds: None
    """Told how many seconds a stage of a room took."""
