"""Open-loop load: requests leave at their arrival times, whatever the server does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.http_client import Completion, CompletionClient
from benchmarks.stats import percentile
from benchmarks.workload import WorkItem


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What a request must keep to count for goodput."""

    ttft_s: float
    itl_s: float
    """Bound on the 99th percentile of the request's own inter-token latencies."""

    def kept_by(self, done: Completion) -> bool:
        if done.error is not None or done.ttft_s > self.ttft_s:
            return False
        slow = percentile(done.gaps_s, 99)
        return slow is None or slow <= self.itl_s


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """One run of a workload against one server."""

    completions: list[Completion]
    seconds: float
    """From the first arrival to the last answer's end."""
    worst_lag_s: float
    """How late, at worst, the client was in sending a request: a busy client makes its own numbers worthless."""

    @property
    def served(self) -> list[Completion]:
        return [done for done in self.completions if done.error is None]

    @property
    def errors(self) -> list[str]:
        return [done.error for done in self.completions if done.error is not None]


async def run_open_loop(client: CompletionClient, items: Sequence[WorkItem]) -> LoadResult:
    """Send every item at its time and wait for all answers."""
    began = time.monotonic()
    lags: list[float] = []

    async def send(item: WorkItem) -> Completion:
        due = began + item.arrival_s
        await asyncio.sleep(due - time.monotonic())
        lags.append(time.monotonic() - due)
        return await client.complete(item.prompt, max_tokens=item.output_tokens)

    completions = await asyncio.gather(*(send(item) for item in items))
    first = min(item.arrival_s for item in items)
    seconds = max(done.ended for done in completions) - began - first
    return LoadResult(completions=completions, seconds=seconds, worst_lag_s=max(lags))
