"""Where the time of one sequence went, for a client that asked: the epochs as its router saw them, and the phases that
replicas told of.

Made with the sequence's output and filled by its generation; read once, when the sequence has finished. Times in it are
milliseconds since the request was received. Those of phases compare two hosts' clocks, which nothing here corrects:
durations are right everywhere, starts only as far as the clocks agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from protocol.phases import Phase, UnixTime

ROUTER = "router"
"""Stands for the replica in the router's own phase."""


@dataclass(slots=True)
class _Epoch:
    prefill: str | None
    decode: str | None
    began: float
    ended: float | None = None
    outcome: str = ""
    detail: str = ""


class SequenceTimeline:
    """Reads `clock` itself: an event loop's own time can be a whole millisecond old, and no finer than that."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, unix_time: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._time = UnixTime(clock, unix_time)
        self._received_at = 0.0
        self._first_token_at: float | None = None
        self._finished_at = 0.0
        self._epochs: list[_Epoch] = []
        self._phases: list[tuple[int, str, Phase]] = []

    def received(self, at: float) -> None:
        """When the HTTP request came, by the same clock as far as the event loop knows it."""
        self._received_at = at

    def opened(self, *, prefill: str | None, decode: str | None) -> None:
        """The next epoch begins on these replicas; None for a half that it has not."""
        self._epochs.append(_Epoch(prefill, decode, self._clock()))

    def failed(self, cause: str, detail: str) -> None:
        """The epoch is over, and another one will follow."""
        epoch = self._epochs[-1]
        epoch.ended, epoch.outcome, epoch.detail = self._clock(), cause, detail

    def heard(self, epoch: int, replica: str, phases: list[Phase]) -> None:
        """A replica told of its part in an epoch."""
        self._phases += [(epoch, replica, phase) for phase in phases]

    def first_token(self) -> None:
        """It is logged."""
        self._first_token_at = self._clock()

    def finished(self) -> None:
        """The last token is logged."""
        self._ended("finished")

    def cut_short(self) -> None:
        """The client has had it ended, maybe before there was an epoch or between two."""
        self._ended("aborted")

    def as_json(self) -> dict[str, Any]:
        """What the client gets; docs/timelines.md has its fields."""
        first = self._first_token_at
        received_us = self._time.microseconds(self._received_at)
        return {
            "received": received_us / 1e6,
            "first_token_ms": None if first is None else self._ms(first),
            "total_ms": self._ms(self._finished_at),
            "epochs": [self._epoch(number, epoch) for number, epoch in enumerate(self._epochs)],
            "phases": [
                self._route(),
                *(_phase(*told, received_us) for told in sorted(self._phases, key=lambda told: told[2].start_us)),
            ],
        }

    def _ended(self, outcome: str) -> None:
        self._finished_at = self._clock()
        if self._epochs and self._epochs[-1].ended is None:
            self._epochs[-1].ended, self._epochs[-1].outcome = self._finished_at, outcome

    def _ms(self, at: float) -> float:
        return round(1000 * (at - self._received_at), 3)

    def _epoch(self, number: int, epoch: _Epoch) -> dict[str, Any]:
        assert epoch.ended is not None, "read before the sequence has finished"
        return {
            "epoch": number,
            "prefill": epoch.prefill,
            "decode": epoch.decode,
            "start_ms": self._ms(epoch.began),
            "duration_ms": round(1000 * (epoch.ended - epoch.began), 3),
            "outcome": epoch.outcome,
            "detail": epoch.detail,
        }

    def _route(self) -> dict[str, Any]:
        """From the request's arrival until its first room was opened: reading, tokenising, admission, pairing."""
        return {
            "name": "route",
            "epoch": 0,
            "replica": ROUTER,
            "start_ms": 0.0,
            "duration_ms": self._ms(self._epochs[0].began if self._epochs else self._finished_at),
        }


def _phase(epoch: int, replica: str, phase: Phase, received_us: int) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": phase.name,
        "epoch": epoch,
        "replica": replica,
        "start_ms": (phase.start_us - received_us) / 1000,
        "duration_ms": (phase.end_us - phase.start_us) / 1000,
    }
    if phase.peer:
        told |= {"transport": phase.transport, "peer": phase.peer, "bytes": phase.bytes}
    if phase.error:
        told["error"] = phase.error
    return told
