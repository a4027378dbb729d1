"""Counters and histograms of one router, as plain objects that `cluster/` exports.

Kept here so that the router needs no metrics library: `collect()` lists everything with its current value, and an
exporter reads that as often as it likes. One event loop writes; reading from another thread sees whole numbers.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Counter:
    """A number that only grows, for each value of one label."""

    def __init__(self, name: str, help_: str, label: str = "") -> None:
        self.name = name
        self.help = help_
        self.label = label
        self.values: dict[str, int] = {} if label else {"": 0}

    def add(self, amount: int = 1, label: str = "") -> None:
        self.values[label] = self.values.get(label, 0) + amount

    def __getitem__(self, label: str) -> int:
        return self.values.get(label, 0)

    @property
    def total(self) -> int:
        return sum(self.values.values())


class Histogram:
    """How often observations fell at or below each bound; the last count is of those above all bounds."""

    def __init__(self, name: str, help_: str, bounds: tuple[float, ...] = _SECONDS) -> None:
        self.name = name
        self.help = help_
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Gauge:
    """A number that is looked up when asked for."""

    name: str
    help: str
    read: Callable[[], float]


class RouterMetrics:
    """Everything the router counts. Times are seconds, as a client of the router would measure them."""

    def __init__(self) -> None:
        self.requests = Counter("router_requests", "HTTP requests answered, by status", "status")
        self.sequences = Counter("router_sequences", "sequences ended, by how", "outcome")
        self.prompt_tokens = Counter("router_prompt_tokens", "prompt tokens dispatched")
        self.cached_tokens = Counter("router_cached_tokens", "prompt tokens that a prefix cache held")
        self.output_tokens = Counter("router_output_tokens", "tokens logged")
        self.aborts = Counter("router_aborts", "rooms aborted, by reason", "reason")
        self.closed_rooms = Counter("router_closed_rooms", "aborts that a replica has acknowledged")
        self.failovers = Counter("router_failovers", "epochs opened after the first, by cause", "cause")
        self.stale_messages = Counter("router_stale_messages", "messages of rooms that are no more, ignored")
        self.contradictions = Counter("router_contradictions", "tokens that differed from the log")
        self.overflows = Counter("router_overflows", "streams dropped because the client did not read")
        self.key_file_reads = Counter("router_key_file_reads", "readings of a changed file of API keys", "result")
        self.tenant_requests = Counter("router_tenant_requests", "requests let in, by tenant", "tenant")
        self.tenant_tokens = Counter("router_tenant_tokens", "prompt and output tokens, by tenant", "tenant")
        self.tenant_refusals = Counter("router_tenant_refusals", "requests over a tenant's limit, by tenant", "tenant")
        self.resumed_streams = Counter("router_resumed_streams", "streams that a client came back to")
        self.dropped_streams = Counter("router_dropped_streams", "kept streams dropped, by what ran out", "reason")
        self.link_losses = Counter("router_link_losses", "links to replicas lost, by replica", "replica")
        self.ttft_s = Histogram("router_ttft_seconds", "request received to first token logged")
        self.itl_s = Histogram("router_itl_seconds", "between tokens of one sequence")
        self.request_s = Histogram("router_request_seconds", "request received to response complete")
        self.gauges: list[Gauge] = []

    def add_gauge(self, name: str, help_: str, read: Callable[[], float]) -> None:
        self.gauges.append(Gauge(name, help_, read))

    def collect(self) -> Iterator[Counter | Histogram | Gauge]:
        """Every metric, for an exporter."""
        for metric in vars(self).values():
            if isinstance(metric, Counter | Histogram):
                yield metric
        yield from self.gauges
