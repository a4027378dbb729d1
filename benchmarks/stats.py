"""The few statistics that benchmarks report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the nearest ranks; None when there are no values."""
    if not values:
        return None
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def median(values: Sequence[float]) -> float | None:
    """None when there are no values."""
    return statistics.median(values) if values else None


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def added_percent(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else (after - before) / before * 100
