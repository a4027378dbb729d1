"""Timelines of requests (docs/timelines.md) as one trace in Chrome's JSON format, which Perfetto opens.

Each replica, and the router, is a process of the trace. In a process, phases that overlap in time lie on rows of their
own, since a row of this format can only nest. Times count from the arrival of the earliest request, or from the first
phase where the clock of its host is so far behind that it seems to begin before: viewers drop what is before zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ROUTER = "router"
_EVENT_FIELDS = frozenset({"name", "replica", "start_ms", "duration_ms"})


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of time on one replica's track, in microseconds, and what lies within it."""

    name: str
    start_us: float
    end_us: float
    details: Mapping[str, Any]
    within: list[Span] = field(default_factory=list)


def chrome_trace(timelines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The trace of requests by their names."""
    began = min(map(_beginning, timelines.values()), default=0.0)
    tracks: dict[str, list[Span]] = {ROUTER: []}
    roles: dict[str, str] = {}
    for request, timeline in timelines.items():
        offset_us = 1e6 * (timeline["received"] - began)
        tracks[ROUTER].append(_request_span(request, timeline, offset_us))
        for epoch in timeline["epochs"]:
            for role in ("prefill", "decode"):
                if epoch[role] is not None:
                    roles.setdefault(epoch[role], role)
        for phase in timeline["phases"]:
            if phase["replica"] != ROUTER:
                tracks.setdefault(phase["replica"], []).append(_span(phase["name"], phase, request, offset_us))
    events: list[dict[str, Any]] = []
    order = sorted(tracks, key=lambda replica: (replica != ROUTER, roles.get(replica) != "prefill", replica))
    for pid, replica in enumerate(order):
        name = f"{roles[replica]} {replica}" if replica in roles else replica
        events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
        for row, span in _rows(tracks[replica]):
            events += _events(span, pid, row)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _beginning(timeline: Mapping[str, Any]) -> float:
    """Of a request, or of the phase that seems to begin before it, in Unix time."""
    earliest_ms: float = min(0.0, *(phase["start_ms"] for phase in timeline["phases"]))
    received: float = timeline["received"]
    return received + earliest_ms / 1000


def _request_span(request: str, timeline: Mapping[str, Any], offset_us: float) -> Span:
    """The request as the router saw it, its epochs and the router's own phases within."""
    end_us = offset_us + 1000 * timeline["total_ms"]
    within = [
        _span(phase["name"], phase, request, offset_us, latest_us=end_us)
        for phase in timeline["phases"]
        if phase["replica"] == ROUTER
    ]
    within += [
        _span(f"epoch {epoch['epoch']}", epoch, request, offset_us, latest_us=end_us) for epoch in timeline["epochs"]
    ]
    details = {"request": request, "first_token_ms": timeline["first_token_ms"]}
    return Span(name=request, start_us=offset_us, end_us=end_us, details=details, within=within)


def _span(
    name: str, told: Mapping[str, Any], request: str, offset_us: float, *, latest_us: float = float("inf")
) -> Span:
    start_us = min(offset_us + 1000 * told["start_ms"], latest_us)
    end_us = min(start_us + 1000 * told["duration_ms"], latest_us)
    details = {"request": request} | {key: value for key, value in told.items() if key not in _EVENT_FIELDS}
    return Span(name=name, start_us=start_us, end_us=end_us, details=details)


def _rows(spans: list[Span]) -> Iterator[tuple[int, Span]]:
    """Each span with the first row that is free when it starts."""
    free_at: list[float] = []
    for span in sorted(spans, key=lambda span: (span.start_us, span.end_us)):
        row = next((row for row, free in enumerate(free_at) if free <= span.start_us), len(free_at))
        if row == len(free_at):
            free_at.append(0.0)
        free_at[row] = span.end_us
        yield row, span


def _events(span: Span, pid: int, row: int) -> Iterator[dict[str, Any]]:
    yield {
        "ph": "X",
        "name": span.name,
        "cat": "phase",
        "pid": pid,
        "tid": row,
        "ts": round(span.start_us, 3),
        "dur": round(span.end_us - span.start_us, 3),
        "args": dict(span.details),
    }
    for inner in span.within:
        yield from _events(inner, pid, row)
