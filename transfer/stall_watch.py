"""Notices that nothing moves any more on a connection that something should move on. Loop thread only.

It looks a few times within its limit and counts the looks that found nothing new, not the time: a process that was
stopped, or had to wait for a core, finds nothing new at its first look because it did not listen, and that is no fault
of the peer's.
"""

from __future__ import annotations

from collections.abc import Callable

from transfer.io_loop import IoLoop

_LOOKS = 4


class StallWatch:
    """Calls `on_stall` when nothing has `moved` for `seconds`, or up to a quarter longer; once, unless it is cancelled
    before."""

    def __init__(
        self, loop: IoLoop, *, clock: Callable[[], float], seconds: float, on_stall: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._pause_s = seconds / _LOOKS
        self._on_stall = on_stall
        self._still = 0
        self._set_timer()

    def moved(self) -> None:
        """A byte came or went."""
        self._still = 0

    def cancel(self) -> None:
        self._timer.cancel()

    def _set_timer(self) -> None:
        self._timer = self._loop.call_at(self._clock() + self._pause_s, self._look)

    def _look(self) -> None:
        self._still += 1
        if self._still > _LOOKS:
            self._on_stall()
        else:
            self._set_timer()
