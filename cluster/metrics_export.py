"""Hands the numbers of a replica or router to Ray, which shows them in its dashboard and serves them to Prometheus.

Lifecycle: one task on the event loop reads everything every few seconds; the owners count in plain objects and know
nothing of Ray. What is called `router_requests` here is `ray_pd_router_requests` in Prometheus, with the labels `pool`
and `replica` beside Ray's own.

A histogram goes out as Prometheus would show it, cumulative buckets and all, but as gauges: Ray's own histograms take
one observation at a time, which at thousands of tokens a second is work for nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ray.util import metrics as ray_metrics

from cluster.background_task import BackgroundTask
from router.metrics import Counter, Gauge, Histogram

log = logging.getLogger(__name__)

_PERIOD_S = 2.0
_PREFIX = "pd_"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One number at one moment."""

    name: str
    help: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)
    grows: bool = False
    """A counter: never falls while the process lives."""


def readings_of(metrics: Iterable[Counter | Gauge | Histogram]) -> Iterator[Reading]:
    """Everything that these metrics say now."""
    for metric in metrics:
        match metric:
            case Counter():
                for value_of_label, count in list(metric.values.items()):
                    labels = {metric.label: value_of_label} if metric.label else {}
                    yield Reading(name=metric.name, help=metric.help, value=count, labels=labels, grows=True)
            case Gauge():
                yield Reading(name=metric.name, help=metric.help, value=metric.read())
            case Histogram():
                yield from histogram_readings(metric, {})


def histogram_readings(metric: Histogram, labels: dict[str, str]) -> Iterator[Reading]:
    """`_bucket` by upper bound, `_count` and `_sum`, as in Prometheus' text format."""
    bounds = [*(f"{bound:g}" for bound in metric.bounds), "+Inf"]
    totals = list(itertools.accumulate(metric.counts))
    for bound, total in zip(bounds, totals, strict=True):
        yield Reading(name=f"{metric.name}_bucket", help=metric.help, value=total, labels=labels | {"le": bound})
    yield Reading(name=f"{metric.name}_count", help=metric.help, value=totals[-1], labels=labels)
    yield Reading(name=f"{metric.name}_sum", help=metric.help, value=metric.sum, labels=labels)


class MetricsExporter:
    """Reads `collect` every two seconds and tells Ray, adding `labels` to every number."""

    def __init__(self, collect: Callable[[], Iterable[Reading]], *, labels: dict[str, str]) -> None:
        self._collect = collect
        self._labels = labels
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}
        self._task = BackgroundTask(self._run)

    def start(self) -> None:
        self._task.start()

    async def stop(self) -> None:
        """Tell Ray the last numbers and end."""
        if not self._task.started:
            return
        await self._task.stop()
        self.export()

    def export(self) -> None:
        """Tell Ray every number now."""
        for reading in self._collect():
            labels = self._labels | reading.labels
            if reading.grows:
                self._count(reading, labels)
            else:
                self._gauge(reading, labels).set(reading.value, tags=labels)

    async def _run(self) -> None:
        while True:
            try:
                self.export()
            except Exception:  # numbers are never worth a replica
                log.exception("metrics could not be exported")
            await asyncio.sleep(_PERIOD_S)

    def _gauge(self, reading: Reading, labels: dict[str, str]) -> ray_metrics.Gauge:
        gauge = self._gauges.get(reading.name)
        if gauge is None:
            gauge = ray_metrics.Gauge(_PREFIX + reading.name, description=reading.help, tag_keys=tuple(labels))
            self._gauges[reading.name] = gauge
        return gauge

    def _count(self, reading: Reading, labels: dict[str, str]) -> None:
        counter = self._counters.get(reading.name)
        if counter is None:
            counter = ray_metrics.Counter(_PREFIX + reading.name, description=reading.help, tag_keys=tuple(labels))
            self._counters[reading.name] = counter
        key = (reading.name, tuple(labels.values()))
        grown_by = reading.value - self._counted.get(key, 0.0)
        if grown_by > 0:
            counter.inc(grown_by, tags=labels)
            self._counted[key] = reading.value
