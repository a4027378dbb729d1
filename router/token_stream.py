"""The tokens between the links and one client: a bounded buffer with one reader.

Links put tokens in and never wait; the request's own task takes out everything that is ready, so a burst costs one
wake-up. A client that does not keep up fills the buffer, and one token more ends its request: nobody else notices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from protocol.rooms import TokenEvent

Ready = list[tuple[int, TokenEvent]]


class TokenStream:
    """(sequence index, event) in order of arrival, for one HTTP request of one or more sequences."""

    def __init__(self, *, max_buffered: int, on_overflow: Callable[[], None]) -> None:
        self._max_buffered = max_buffered
        self._on_overflow = on_overflow
        self._ready: Ready = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, event: TokenEvent) -> None:
        """Add one token; over the bound everything is dropped and `on_overflow` is called, once."""
        if self._error is not None:
            return
        if len(self._ready) >= self._max_buffered:
            self._on_overflow()
            return
        self._ready.append((index, event))
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream: the reader gets what is buffered, then `error`. Only the first one counts."""
        if self._error is None:
            self._error = error
            self._wake()

    def drop(self, error: Exception) -> None:
        """End the stream at once, with what is buffered thrown away."""
        self._ready = []
        self.fail(error)

    async def next(self) -> Ready:
        """Everything that is ready, at least one token; raises the error that ended the stream."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        ready, self._ready = self._ready, []
        return ready

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
