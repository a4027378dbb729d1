"""The streams of one router that can be come back to.

A record is LIVE while a run writes it, then KEPT for `window_s`, or until its space is needed: the oldest go first. The
requests of LIVE ones need space, too; a stream that finds none cannot be come back to. A client that comes back takes
it (LIVE again); another router that asks for it takes it away. What is left then is its name and what became of it, for
a while.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from router.metrics import RouterMetrics
from router.streams.record import StreamRecord

_MOST_NAMES = 20_000
_RELEASE_S = 5.0
"""A run that is cut ends within a few passes of the loop."""


class StreamBusyError(Exception):
    """The stream is still being written elsewhere."""


@dataclass(frozen=True)
class Gone:
    """What became of a stream: it moved to that router, or ("") its time is over, or it never was kept."""

    moved_to: str = ""
    why: str = ""
    """It never was."""


@dataclass
class _Live:
    record: StreamRecord
    released: asyncio.Event
    held: int = 0
    """Bytes of its request, once that is to be kept."""


class Shelf:
    """Times are seconds of `clock`."""

    def __init__(
        self,
        *,
        window_s: float,
        max_streams: int,
        max_bytes: int,
        clock: Callable[[], float],
        metrics: RouterMetrics,
    ) -> None:
        self._window_s = window_s
        self._max_streams = max_streams
        self._max_bytes = max_bytes
        self._clock = clock
        self._metrics = metrics
        self._live: dict[str, _Live] = {}
        self._kept: OrderedDict[str, tuple[float, int, StreamRecord]] = OrderedDict()
        """(until when, bytes, record), the oldest first."""
        self._kept_bytes = 0
        self._live_bytes = 0
        self._gone: OrderedDict[str, Gone] = OrderedDict()
        metrics.add_gauge("router_kept_streams", "streams kept for clients that come back", lambda: len(self._kept))
        metrics.add_gauge("router_kept_stream_bytes", "what these occupy", lambda: self._kept_bytes)
        metrics.add_gauge("router_live_stream_bytes", "requests of streams being written", lambda: self._live_bytes)

    def begin(self, record: StreamRecord) -> None:
        """This stream is written from now on, until `keep`."""
        self._gone.pop(record.stamp.token, None)
        self._live[record.stamp.token] = _Live(record, asyncio.Event())

    def hold(self, record: StreamRecord) -> bool:
        """Have space for the request of a stream that has begun, until `keep`; False when there is none.

        One that is come back to has it always: its client was told that it can.
        """
        size = len(record.body)
        if not record.log and self._live_bytes + size > self._max_bytes:
            return False
        self._live[record.stamp.token].held = size
        self._live_bytes += size
        self._make_room()
        return True

    def keep(self, record: StreamRecord) -> None:
        """It is no longer written. One of which nothing was written, or that cannot be come back to, is not kept."""
        token = record.stamp.token
        live = self._live.pop(token)
        live.released.set()
        self._live_bytes -= live.held
        record.cut = None
        self.expire()
        size = record.num_bytes
        if record.unkept:
            self._bury(token, Gone(why=record.unkept))
        if not record.log:
            return
        if size > self._max_bytes or not self._window_s:
            self._bury(token, Gone())
            return
        self._kept[token] = (self._clock() + self._window_s, size, record)
        self._kept_bytes += size
        self._make_room()

    def knows(self, token: str) -> bool:
        """Whether the stream is here, whoever's it is."""
        return token in self._live or token in self._kept

    async def take(self, token: str, tenant: str) -> StreamRecord | Gone | None:
        """A stream of this tenant, its run ended if it has one; what became of it; or None for one not known.

        Raises `StreamBusyError` when its run does not end, or another client was quicker.
        """
        live = self._live.get(token)
        if live is not None:
            if live.record.stamp.tenant != tenant:
                return None
            if live.record.unkept:
                return Gone(why=live.record.unkept)
            await self._cut(live)
        self.expire()
        found = self._kept.get(token)
        if found is not None:
            if found[2].stamp.tenant != tenant:
                return None
            self._remove(token)
            return found[2]
        gone = self._gone.get(token)
        if gone is None and live is not None:
            raise StreamBusyError
        return gone

    def moved(self, token: str, router_key: str) -> None:
        """A stream that was taken has gone to that router."""
        self._bury(token, Gone(router_key))

    def expire(self) -> None:
        """Drop what has been kept long enough."""
        now = self._clock()
        while self._kept and next(iter(self._kept.values()))[0] <= now:
            self._drop_oldest("time")

    async def tend(self) -> None:
        """Expire now and then, for ever: memory comes back without requests, too."""
        while self._window_s:
            await asyncio.sleep(self._window_s / 4)
            self.expire()

    async def _cut(self, live: _Live) -> None:
        if live.record.cut is not None:
            live.record.cut()
        try:
            async with asyncio.timeout(_RELEASE_S):
                await live.released.wait()
        except TimeoutError as error:
            raise StreamBusyError from error

    def _make_room(self) -> None:
        while self._kept and (
            len(self._kept) > self._max_streams or self._kept_bytes + self._live_bytes > self._max_bytes
        ):
            self._drop_oldest("space")

    def _drop_oldest(self, why: str) -> None:
        token = next(iter(self._kept))
        self._remove(token)
        self._bury(token, Gone())
        self._metrics.dropped_streams.add(label=why)

    def _remove(self, token: str) -> None:
        self._kept_bytes -= self._kept.pop(token)[1]

    def _bury(self, token: str, gone: Gone) -> None:
        self._gone[token] = gone
        self._gone.move_to_end(token)
        while len(self._gone) > _MOST_NAMES:
            self._gone.popitem(last=False)
