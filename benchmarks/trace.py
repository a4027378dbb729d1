"""Timelines of requests (docs/timelines.md) as one trace in Chrome's JSON format, which Perfetto opens.

Each replica, and the router, is a process of the trace. What a request did there is a slice of the request's name, with
its phases in it; a row of this format can only nest, so what overlaps in time lies on rows of its own. A flow goes
through the slices of each request.

Viewers are strict. Perfetto drops a slice that sticks out of the one it begins in by a nanosecond, and takes row 0 of a
process for the row that has the process's own number; what is before zero is dropped, too. So times are whole
microseconds, as timelines have them, and count from the arrival of the earliest request, or from the first phase where
the clock of its host is so far behind that it seems to begin before; no two rows or processes have the same number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ROUTER = "router"
_EVENT_FIELDS = frozenset({"name", "replica", "start_ms", "duration_ms"})


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of time on one replica's track, in microseconds, and what lies within it."""

    name: str
    start_us: int
    end_us: int
    details: Mapping[str, Any]
    within: list[Span] = field(default_factory=list)


def chrome_trace(timelines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The trace of requests by their names."""
    began_us = min(map(_beginning_us, timelines.values()), default=0)
    tracks: dict[str, list[Span]] = {ROUTER: []}
    roles: dict[str, str] = {}
    for request, timeline in timelines.items():
        offset_us = _received_us(timeline) - began_us
        tracks[ROUTER].append(_request_span(request, timeline, offset_us))
        for epoch in timeline["epochs"]:
            for role in ("prefill", "decode"):
                if epoch[role] is not None:
                    roles.setdefault(epoch[role], role)
        phases: dict[tuple[str, int], list[Span]] = {}
        for phase in timeline["phases"]:
            if phase["replica"] != ROUTER:
                spans = phases.setdefault((phase["replica"], phase["epoch"]), [])
                spans.append(_span(phase["name"], phase, offset_us))
        for (replica, epoch), spans in phases.items():
            tracks.setdefault(replica, []).extend(_parts(request, epoch, spans))
    order = sorted(tracks, key=lambda replica: (replica != ROUTER, roles.get(replica) != "prefill", replica))
    named = {replica: f"{roles[replica]} {replica}" if replica in roles else replica for replica in order}
    return {"traceEvents": list(_events(named, tracks)), "displayTimeUnit": "ms"}


def _received_us(timeline: Mapping[str, Any]) -> int:
    received_s: float = timeline["received"]
    return round(1e6 * received_s)


def _beginning_us(timeline: Mapping[str, Any]) -> int:
    """Of a request, or of the phase that seems to begin before it, in Unix time."""
    earliest_ms: float = min(0.0, *(phase["start_ms"] for phase in timeline["phases"]))
    return _received_us(timeline) + round(1000 * earliest_ms)


def _request_span(request: str, timeline: Mapping[str, Any], offset_us: int) -> Span:
    """The request as the router saw it: its own phases and the epochs, which come one after the other."""
    end_us = offset_us + round(1000 * timeline["total_ms"])
    told = [(phase["name"], phase) for phase in timeline["phases"] if phase["replica"] == ROUTER]
    told += [(f"epoch {epoch['epoch']}", epoch) for epoch in timeline["epochs"]]
    within: list[Span] = []
    free_us = offset_us
    for name, one in told:
        within.append(_span(name, one, offset_us, earliest_us=free_us, latest_us=end_us))
        free_us = within[-1].end_us
    details = {"first_token_ms": timeline["first_token_ms"]}
    return Span(name=request, start_us=offset_us, end_us=end_us, details=details, within=within)


def _span(
    name: str, told: Mapping[str, Any], offset_us: int, *, earliest_us: int = 0, latest_us: int | None = None
) -> Span:
    start_us = max(offset_us + round(1000 * told["start_ms"]), earliest_us)
    end_us = offset_us + round(1000 * (told["start_ms"] + told["duration_ms"]))
    if latest_us is not None:
        start_us, end_us = min(start_us, latest_us), min(end_us, latest_us)
    details = {key: value for key, value in told.items() if key not in _EVENT_FIELDS}
    return Span(name=name, start_us=start_us, end_us=max(start_us, end_us), details=details)


def _parts(request: str, epoch: int, phases: list[Span]) -> Iterator[Span]:
    """What a request did at one replica in one epoch: as many slices as its phases need to lie one after the other."""
    for row in _rows(phases):
        details = {"epoch": epoch}
        yield Span(name=request, start_us=row[0].start_us, end_us=row[-1].end_us, details=details, within=row)


def _rows(spans: Iterable[Span]) -> list[list[Span]]:
    """Each span on the first row that is free when it starts; of those that start together the longest goes first."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.start_us, -span.end_us)):
        free = next((row for row in rows if row[-1].end_us <= span.start_us), None)
        if free is None:
            rows.append(free := [])
        free.append(span)
    return rows


def _events(named: Mapping[str, str], tracks: Mapping[str, list[Span]]) -> Iterator[dict[str, Any]]:
    """Names first, then slices in order of their starts, each before what lies in it."""
    placed: list[tuple[int, int, Span]] = []
    next_tid = len(named) + 1
    for pid, (replica, name) in enumerate(named.items(), start=1):
        yield _metadata("process_name", pid, {"name": name})
        yield _metadata("process_sort_index", pid, {"sort_index": pid})
        for row in _rows(tracks[replica]):
            yield _metadata("thread_name", pid, {"name": "requests"}, tid=next_tid)
            placed += [(pid, next_tid, span) for span in row]
            next_tid += 1
    placed.sort(key=lambda one: one[2].start_us)
    last = {span.name: number for number, (_, _, span) in enumerate(placed)}
    flows: dict[str, int] = {}
    for number, (pid, tid, span) in enumerate(placed):
        begins = span.name not in flows
        flow = flows.setdefault(span.name, len(flows) + 1)
        directions = {"flow_in": not begins, "flow_out": number != last[span.name]}
        yield _event(span, pid, tid, "request") | {"bind_id": hex(flow)} | directions
        for inner in span.within:
            yield _event(inner, pid, tid, "phase")


def _metadata(name: str, pid: int, args: dict[str, Any], tid: int | None = None) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "args": args} | ({} if tid is None else {"tid": tid})


def _event(span: Span, pid: int, tid: int, category: str) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.name,
        "cat": category,
        "pid": pid,
        "tid": tid,
        "ts": span.start_us,
        "dur": span.end_us - span.start_us,
        "args": dict(span.details),
    }
