"""The moments after a router's start, in which it knows one pool and not yet the other.

A replica of either pool can serve a request whole, and does when the other pool is gone. Just after a start the other
pool is merely not seen yet, and a request taken whole would stay where long prompts and streams disturb each other: it
waits for the pair instead, for a bounded time.
"""

from __future__ import annotations

from router.membership import MemberTable
from router.pairing import Route


class StartWindow:
    """Open from the first usable replica on, until each pool has been seen usable or `length_s` have passed."""

    def __init__(self, *, length_s: float) -> None:
        self._length_s = length_s
        self._ends_at: float | None = None
        self._over = False

    def replica_up(self, members: MemberTable, now: float) -> None:
        """A link came up."""
        if self._ends_at is None:
            self._ends_at = now + self._length_s
        self._over = self._over or members.is_whole

    def holds_back(self, route: Route, now: float) -> bool:
        """Whether `route` is a makeshift that had better not be taken yet."""
        return route.is_makeshift and not self._over and (self._ends_at is None or now < self._ends_at)
