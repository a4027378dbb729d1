"""Carries what routers tell each other to the directory and back, once a second.

Lifecycle: one task on the router's event loop, started by its owner and ended by `stop`. While the directory is away
the router goes on by itself, with what it last heard.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from cluster.background_task import BackgroundTask
from protocol.membership import RouterReport

log = logging.getLogger(__name__)

_PERIOD_S = 1.0
_CALL_TIMEOUT_S = 5.0


class Exchange(Protocol):
    """The directory's part in it."""

    async def exchange(self, report: RouterReport) -> list[RouterReport]: ...


class RouterGossip:
    def __init__(
        self,
        directory: Exchange,
        *,
        report: Callable[[], RouterReport],
        take: Callable[[Iterable[RouterReport]], None],
        period_s: float = _PERIOD_S,
    ) -> None:
        self._directory = directory
        self._report = report
        self._take = take
        self._period_s = period_s
        self._task = BackgroundTask(self._run)

    def start(self) -> None:
        self._task.start()

    async def stop(self) -> None:
        await self._task.stop()

    async def _run(self) -> None:
        while True:
            report = self._report()
            if report.address.port:  # it listens by now
                try:
                    async with asyncio.timeout(_CALL_TIMEOUT_S):
                        self._take(await self._directory.exchange(report))
                except Exception as error:  # go on with what the others last said
                    log.warning("routers could not tell each other anything, trying again: %s", error)
            await asyncio.sleep(self._period_s)
