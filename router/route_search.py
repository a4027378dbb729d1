"""The search for replicas that the next epoch of one sequence can go to: at once, after a pause, or when one comes up.

Lifecycle: `begin` for each epoch; then `found` or `gave_up` is called once, maybe within `begin`, unless `end` comes
first. Synchronous throughout: timers call in, nothing here waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from router.failover import Failover
from router.pairing import Route, RouteRequest

CallLater = Callable[[float, Callable[[], None]], asyncio.TimerHandle]


class Choose(Protocol):
    """Pairing for the members as they are now; the `patient` may be told (None) to wait for better ones."""

    def __call__(self, request: RouteRequest, *, patient: bool) -> Route | None: ...


@dataclass(kw_only=True)
class _Search:
    """What is searched for now."""

    request: RouteRequest
    deadline: float
    pause_s: float
    found: Callable[[Route], None]
    gave_up: Callable[[], None]
    paused: bool = False
    """The pause has passed, or is passing."""
    lacking_since: float | None = None
    """Since when there is no replica to go on with."""
    timer: asyncio.TimerHandle | None = None

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class RouteSearch:
    """Belongs to a generation, whose `failover` knows which replicas have failed it. A search waits for a replica to
    come up for `wait_s` at most; times are seconds of `clock`."""

    def __init__(
        self, *, choose: Choose, failover: Failover, clock: Callable[[], float], call_later: CallLater, wait_s: float
    ) -> None:
        self._choose = choose
        self._failover = failover
        self._clock = clock
        self._call_later = call_later
        self._wait_s = wait_s
        self._search: _Search | None = None

    def begin(
        self,
        request: RouteRequest,
        *,
        deadline: float,
        pause_s: float,
        found: Callable[[Route], None],
        gave_up: Callable[[], None],
    ) -> None:
        """Search until `deadline` at most, and pause for `pause_s` before a replica that failed this sequence."""
        self.end()
        self._search = _Search(request=request, deadline=deadline, pause_s=pause_s, found=found, gave_up=gave_up)
        self._try()

    def replica_up(self) -> None:
        """A replica can be used (again)."""
        if self._search is not None and self._search.lacking_since is not None:
            self._try()

    def end(self) -> None:
        """Search no more. Does nothing when nothing is searched for."""
        if self._search is not None:
            self._search.cancel_timer()
            self._search = None

    def _try(self) -> None:
        search, now = self._search, self._clock()
        assert search is not None, "a timer outlived its search"
        search.cancel_timer()
        left_s = self._wait_s
        if search.lacking_since is not None:
            left_s += search.lacking_since - now
        route = self._choose(search.request, patient=left_s > 0) if now < search.deadline else None
        if route is None:
            if search.lacking_since is None:
                search.lacking_since = now
            if left_s > 0 and now < search.deadline:  # which ends a shorter wait: the request has a timer for it
                search.timer = self._call_later(left_s, self._try)
            else:
                self.end()
                search.gave_up()
        elif self._failover.is_second_try(route) and not search.paused:
            search.paused = True
            search.timer = self._call_later(search.pause_s, self._try)
        else:
            self.end()
            search.found(route)
