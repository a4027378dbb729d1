"""A replica's numbers, made of what its engine thread last reported: load, rooms, counters, how long stages took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from cluster.metrics_export import Reading, histogram_readings
from router.metrics import Histogram

_LOAD_HELP = {
    "waiting_requests": "requests that wait for their first step",
    "waiting_tokens": "prompt tokens not computed yet",
    "running_requests": "requests in the batch",
    "free_pages": "KV pages that hold nothing",
    "cached_pages": "KV pages that only the prefix cache holds",
    "total_pages": "KV pages in the pool",
    "draining": "1 while the replica takes no rooms",
}


class Reported(Protocol):
    """`worker_state.StateReporter`, as far as it is needed here."""

    @property
    def latest(self) -> dict[str, Any]: ...
    def take_observations(self) -> list[tuple[str, float]]: ...


class ReplicaReadings:
    """Turns reports into readings; keeps the histograms, since observations come only once."""

    def __init__(self, reporter: Reported) -> None:
        self._reporter = reporter
        self._stages: dict[str, Histogram] = {}
        self._room_states: set[tuple[str, str]] = set()

    def collect(self) -> Iterator[Reading]:
        """Everything known now."""
        for stage, seconds in self._reporter.take_observations():
            if stage not in self._stages:
                self._stages[stage] = Histogram("replica_stage_seconds", "how long a stage of a room took")
            self._stages[stage].observe(seconds)
        for stage, histogram in self._stages.items():
            yield from histogram_readings(histogram, {"stage": stage})
        state = self._reporter.latest
        for name, value in state.get("load", {}).items():
            yield Reading(name=f"replica_{name}", help=_LOAD_HELP.get(name, name), value=float(value))
        for name, value in state.get("books", {}).items():
            if name in ("used", "quarantined", "balanced"):
                yield Reading(name=f"replica_pages_{name}", help=f"KV pool when last idle: {name}", value=float(value))
        for half in ("prefill", "decode"):
            yield from self._rooms(half, state.get(half, {}).get("rooms", {}))
            yield from _counters(half, state.get(half, {}).get("counters", {}))

    def _rooms(self, half: str, rooms: Mapping[str, int]) -> Iterator[Reading]:
        """Open rooms by state; a state that has been seen once is told of for ever, 0 included."""
        self._room_states |= {(half, room_state) for room_state in rooms}
        for of_half, room_state in sorted(self._room_states):
            if of_half == half:
                labels = {"half": half, "state": room_state}
                count = float(rooms.get(room_state, 0))
                yield Reading(name="replica_rooms", help="open rooms, by half and state", value=count, labels=labels)


def _counters(half: str, counters: Mapping[str, Any]) -> Iterator[Reading]:
    for name, value in counters.items():
        by_kind = value if isinstance(value, Mapping) else {"": value}
        for kind, count in by_kind.items():
            labels = {"half": half, "kind": str(kind)}
            yield Reading(
                name=f"replica_{name}", help=f"{name}, by half", value=float(count), labels=labels, grows=True
            )
