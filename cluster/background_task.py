"""A loop on the event loop that its owner starts and stops.

Lifecycle: `start` once, with the event loop running; `stop` cancels it and waits until it has ended. One that was never
started needs no `stop`, and may have it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine


class BackgroundTask:
    """Runs `loop`, which does not end by itself."""

    def __init__(self, loop: Callable[[], Coroutine[None, None, None]]) -> None:
        self._loop = loop
        self._task: asyncio.Task[None] | None = None

    @property
    def started(self) -> bool:
        return self._task is not None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._loop())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
