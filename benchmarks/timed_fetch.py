"""One fetch of pages, timed: what the benchmarks of the transports have in common."""

from __future__ import annotations

import threading
import time

from transfer.fetcher import PageFetcher
from transfer.jobs import FetchJob, FetchResult

_TIMEOUT_S = 60.0


def timed_fetch(fetcher: PageFetcher, job: FetchJob, *, transport: str) -> float:
    """Seconds from the call of `fetch` to that of `on_done`.

    Raises `RuntimeError` when the fetch fails or takes a minute, and when another way than `transport` did it.
    """
    done = threading.Event()
    answers: list[tuple[float, FetchResult]] = []

    def on_done(result: FetchResult) -> None:
        answers.append((time.perf_counter(), result))
        done.set()

    begin = time.perf_counter()
    fetcher.fetch(job, on_done)
    if not done.wait(_TIMEOUT_S):
        raise RuntimeError(f"a fetch has not ended after {_TIMEOUT_S:g} s")
    end, result = answers[0]
    if not result.ok or result.transport != transport:
        raise RuntimeError(f"a fetch by {transport} went by {result.transport or 'none'}: {result.error}")
    return end - begin
