"""A replica's numbers, made of what its engine thread last reported: load, rooms, counters, how long stages took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from cluster.metrics_export import Reading, histogram_readings
from decode.table import DecodeState
from prefill.table import PrefillState
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

_TRAFFIC = {
    "copies": ("transfers", "copies of pages that ended well"),
    "failures": ("transfer_failures", "copies of pages that failed"),
    "bytes": ("transfer_bytes", "bytes of KV copied"),
    "seconds": ("transfer_seconds", "from first to last byte of a copy, summed"),
    "queue_seconds": ("transfer_queue_seconds", "from the request of a copy to its first byte, summed"),
}
"""What is told of transfers: (name of the reading, help) by name in the report."""

_GRAMMARS = {
    "hits": ("grammar_hits", "grammars that were compiled already, or refused"),
    "compiles": ("grammar_compiles", "grammars compiled, the refused ones included"),
    "compile_seconds": ("grammar_compile_seconds", "what compiling took, summed"),
    "refused": ("grammar_refused", "grammars that could not be compiled"),
    "dropped": ("grammar_dropped", "grammars that nobody wanted any more when their turn to be compiled came"),
    "masks": ("grammar_masks", "masks made: one for each constrained token"),
    "fill_seconds": ("grammar_mask_seconds", "what making masks took, summed, beside the model"),
    "wait_seconds": ("grammar_mask_wait_seconds", "what steps waited for masks, summed"),
    "given_up": ("grammar_masks_given_up", "masks that took too long, which ended their requests"),
}
"""What is told of grammars: (name of the reading, help) by name in the report."""

_ROOM_STATES: dict[str, tuple[PrefillState | DecodeState, ...]] = {
    "prefill": (PrefillState.WAITING, PrefillState.COMPUTING, PrefillState.RETAINED),
    "decode": (DecodeState.QUEUED, DecodeState.RECEIVING, DecodeState.RUNNING, DecodeState.DRAINING),
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
        for name, value in state.get("engine", {}).items():
            yield Reading(name=f"replica_engine_{name}", help=f"{name} of the engine", value=float(value), grows=True)
        yield from _grammars(state.get("grammars", {}))
        for half in ("prefill", "decode"):
            yield from _rooms(half, state.get(half, {}).get("rooms", {}))
            yield from _counters(half, state.get(half, {}).get("counters", {}))
        for row in state.get("transfers", ()):
            yield from _traffic("replica_", row, {"transport": row["transport"]}, grows=True)
        for row in state.get("peer_transfers", ()):
            # Gauges: Ray forgets those that are no longer told, and never a counter, so peers would add up there.
            yield from _traffic("replica_peer_", row, {"transport": row["transport"], "peer": row["peer"]}, grows=False)


def _grammars(told: Mapping[str, Any]) -> Iterator[Reading]:
    for field, value in told.get("counters", {}).items():
        name, help_ = _GRAMMARS[field]
        yield Reading(name=f"replica_{name}", help=help_, value=float(value), grows=True)
    for field, help_ in (("waiting", "requests that wait for their grammars"), ("bytes", "of compiled grammars kept")):
        if field in told:
            yield Reading(name=f"replica_grammar_{field}", help=help_, value=float(told[field]))


def _rooms(half: str, rooms: Mapping[str, int]) -> Iterator[Reading]:
    """Open rooms by state, those states included that no room is in now."""
    for state in _ROOM_STATES[half]:
        labels = {"half": half, "state": state.value}
        count = float(rooms.get(state.value, 0))
        yield Reading(name="replica_rooms", help="open rooms, by half and state", value=count, labels=labels)


def _counters(half: str, counters: Mapping[str, Any]) -> Iterator[Reading]:
    for name, value in counters.items():
        by_kind = value if isinstance(value, Mapping) else {"": value}
        for kind, count in by_kind.items():
            labels = {"half": half, "kind": str(kind)}
            yield Reading(
                name=f"replica_{name}", help=f"{name}, by half", value=float(count), labels=labels, grows=True
            )


def _traffic(prefix: str, row: Mapping[str, Any], labels: dict[str, str], *, grows: bool) -> Iterator[Reading]:
    for field, (name, help_) in _TRAFFIC.items():
        yield Reading(name=prefix + name, help=help_, value=float(row[field]), labels=labels, grows=grows)
