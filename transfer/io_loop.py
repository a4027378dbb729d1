"""One thread that waits for sockets and timers: the page server's, and the fetcher's for everything over sockets.

Nothing in it ever blocks on a peer, so a peer that hangs holds up nobody. Callbacks run one at a time, in the loop's
thread or, while that sleeps, in the thread of whoever would have to wake it (`call_at_once`): what is "the loop's", or
"loop thread only", is touched by nothing else. What may be called from other threads says so. Timers follow the clock
they were given, which tests turn by hand: the loop looks at it at least every `_LOOK_S` seconds while a timer is set,
and sleeps for as long as it likes otherwise.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
_LOOK_S = 0.25
_COMPACT_TIMERS = 256


class Watchable(Protocol):
    """A socket, or what else has a descriptor."""

    def fileno(self) -> int: ...


class Timer:
    """A call to come. `cancel` may be called from any thread, also when it is too late."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class IoLoop:
    """Starts its thread at once; `close` ends it."""

    def __init__(self, *, name: str, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._epoll = select.epoll()
        self._watched: dict[int, tuple[int, Callable[[], None]]] = {}  # descriptor -> events, callback
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wakeup, READ)
        self._ready: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_ids = itertools.count()
        self._compact_at = _COMPACT_TIMERS
        self._lock = threading.Lock()  # of the timers, of `_closing` and of `_wakeup`
        self._looking_until = float("inf")  # when the sleeping loop means to look at its timers
        self._closing = False
        self._turn = threading.Lock()  # held while callbacks run; callers never wait for it
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # ---- from any thread ----------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether it still answers: not once it was closed, or something went wrong that is no callback's."""
        return self._thread.is_alive()

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run `callback` in the loop's thread, after those asked for before it. Also the last call before `close` is
        still run; one after it never is."""
        self._ready.append(callback)
        if threading.current_thread() is not self._thread:
            self._wake()

    def call_at_once(self, callback: Callable[[], None]) -> None:
        """Run `callback` within this call if the loop sleeps and nothing that was asked for before waits; else soon, in
        the loop's thread. To wake that takes longer than a short callback. Never waits for other callbacks, and from
        within one never nests."""
        if self._turn.acquire(blocking=False):
            try:
                at_once = not self._ready and not self._closing
                if at_once:
                    self._guarded(callback)
            finally:
                self._turn.release()
            if at_once:
                return
        self.call_soon(callback)

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Run `callback` once the clock shows `when`."""
        timer = Timer(when, callback)
        with self._lock:
            if len(self._timers) >= self._compact_at:
                self._drop_cancelled()
            heapq.heappush(self._timers, (when, next(self._timer_ids), timer))
            wake = when < self._looking_until
            if wake:
                self._looking_until = when
        if wake and threading.current_thread() is not self._thread:
            self._wake()
        return timer

    def close(self, *, timeout_s: float) -> None:
        """Run what is ready, then end the thread. Sockets are their owners' to close. Raises `TimeoutError` when a
        callback does not come back in time. Must not be called from the loop's thread."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._thread.name} is still busy after {timeout_s} s")
        self._epoll.close()
        with self._lock:  # a late call must not be written to whatever has this descriptor next
            os.close(self._wakeup)
            self._wakeup = -1
            self._timers.clear()
        self._watched.clear()

    # ---- from callbacks -----------------------------------------------------------------------------------

    def watch(self, sock: Watchable, events: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `sock` is ready for one of `events`, or broken. Replaces what was asked for
        before."""
        fd = sock.fileno()
        before = self._watched.get(fd)
        if before is None:
            self._epoll.register(fd, events)
        elif before[0] != events:
            self._epoll.modify(fd, events)
        self._watched[fd] = (events, callback)

    def forget(self, sock: Watchable) -> None:
        """Stop watching `sock`, if it was watched; to be called before it is closed."""
        if self._watched.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock.fileno())

    # ---- inner workings -----------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._lock:
            if self._wakeup >= 0:
                os.eventfd_write(self._wakeup, 1)

    def _run(self) -> None:
        try:
            self._turns()
        except BaseException:
            logger.exception("the loop of %s died", self._thread.name)

    def _turns(self) -> None:
        while True:
            # A time limit is over when it was before we looked for what had come: this process may be stopped anywhere
            # below, and what came meanwhile, in time, is seen only when it looks again.
            now = self._clock()
            events = self._epoll.poll(self._sleep_s())
            with self._turn:
                for fd, _ in events:
                    if fd == self._wakeup:
                        os.eventfd_read(self._wakeup)
                    elif fd in self._watched:  # or else forgotten since, by another's callback
                        self._guarded(self._watched[fd][1])
                for _ in range(len(self._ready)):
                    self._guarded(self._ready.popleft())
                for timer in self._due(now):
                    if timer.callback is not None:
                        self._guarded(timer.callback)
                if self._closing and not self._ready:
                    return

    def _guarded(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:  # a bug in one connection's callback must not take the others along
            logger.exception("a callback of %s failed", self._thread.name)

    def _sleep_s(self) -> float | None:
        with self._lock:
            if self._ready or self._closing:
                return 0.0
            if not self._timers:
                self._looking_until = float("inf")
                return None
            self._looking_until = self._timers[0][0]
            return min(max(self._looking_until - self._clock(), 0.0), _LOOK_S)

    def _due(self, now: float) -> list[Timer]:
        due: list[Timer] = []
        with self._lock:
            while self._timers and self._timers[0][0] <= now:
                due.append(heapq.heappop(self._timers)[2])
            return due

    def _drop_cancelled(self) -> None:
        self._timers = [entry for entry in self._timers if entry[2].callback is not None]
        heapq.heapify(self._timers)
        self._compact_at = max(_COMPACT_TIMERS, 2 * len(self._timers))  # or many living ones are gone through each time
