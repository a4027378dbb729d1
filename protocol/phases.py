"""The phases of a request: where each half says its time went, for requests that ask.

A half notes phases in a `PhaseLog` as they end, in readings of its own clock, and tells them to the router in `Phases`
messages (`rooms.py`), in Unix microseconds of its host. What is told is forgotten. A half of a room that nobody asked
about has no log.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import msgspec


class PhaseName(enum.StrEnum):
    """What halves call their phases. On the wire they are plain text, so that a name is never unknown."""

    QUEUE = "queue"
    """Prefill, and a half that generates: from the open until the room's first step began. Decode: until it had pages,
    from the open or from the revocation of the pages it had."""
    HANDSHAKE = "handshake"
    """Prefill: from the open until decode had joined; nothing where its join was here first."""
    COMPUTE = "compute"
    """From the beginning of the prompt's first step until the token sampled after its last."""
    TRANSFER_QUEUE = "transfer_queue"
    """Of one copy: from its request until its first byte, a connection to the peer included where there was none."""
    TRANSFER = "transfer"
    """Of one copy: from its first to its last byte, verified."""
    ADMIT = "admit"
    """From the last page or the handoff, whichever came later, until the first decode step began."""
    FIRST_DECODE = "first_decode"
    """The first decode step: the second token is there at its end."""
    DECODE = "decode"
    """From this half's first token until its last."""


class Phase(msgspec.Struct, frozen=True, array_like=True):
    """One stretch of time; ends are Unix microseconds of the host that measured them."""

    name: str
    start_us: int
    end_us: int
    transport: str = ""
    """Of a copy, like all that follows."""
    peer: str = ""
    """Replica the pages came from."""
    bytes: int = 0
    error: str = ""
    """Why the copy failed; empty when it did not."""


class UnixTime:
    """Readings of a clock that only grows, as Unix time."""

    def __init__(self, clock: Callable[[], float], unix_time: Callable[[], float]) -> None:
        # A thread can lose its turn between two readings: of three attempts the one that took least is right.
        attempts = [(clock(), unix_time(), clock()) for _ in range(3)]
        before, now, _ = min(attempts, key=lambda attempt: attempt[2] - attempt[0])
        self._offset_s = now - before

    def microseconds(self, reading: float) -> int:
        return round((reading + self._offset_s) * 1e6)


class PhaseLog:
    """What one half of one room has to tell. Belongs to the room, on the engine thread."""

    def __init__(self, clock: Callable[[], float], unix_time: Callable[[], float]) -> None:
        self._time = UnixTime(clock, unix_time)
        self._phases: list[Phase] = []

    def add(
        self,
        name: PhaseName,
        start: float,
        end: float,
        *,
        transport: str = "",
        peer: str = "",
        num_bytes: int = 0,
        error: str = "",
    ) -> None:
        """A phase is over; `start` and `end` are readings of the clock."""
        start_us, end_us = self._time.microseconds(start), self._time.microseconds(end)
        self._phases.append(Phase(name.value, start_us, end_us, transport, peer, num_bytes, error))

    def take(self) -> list[Phase]:
        """Everything added since the last call, in order of their ends as noted."""
        taken, self._phases = self._phases, []
        return taken
