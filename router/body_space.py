"""Memory for the bodies of requests that are being read, over all connections of one router.

A request takes what it needs as its body arrives and gives it back once it is parsed. Nobody waits for space: bodies
that find none are refused, so that many large ones cannot end the router.
"""

from __future__ import annotations

from router.errors import overloaded
from router.metrics import RouterMetrics


class BodySpace:
    """Of one router, on its event loop."""

    def __init__(self, *, max_bytes: int, retry_after_s: int, metrics: RouterMetrics) -> None:
        self._max_bytes = max_bytes
        self._retry_after_s = retry_after_s
        self._taken = 0
        metrics.add_gauge("router_body_bytes", "bodies of requests being read", lambda: self._taken)

    def take(self, size: int) -> None:
        """Have so many bytes, until they are given back; raises `ApiError` (429) where there are too few."""
        if self._taken + size > self._max_bytes:
            message = (
                f"the bodies of requests that are being read take {self._taken} bytes, and this router has "
                f"{self._max_bytes} for them; try again"
            )
            raise overloaded(429, message, code="too_many_bytes", retry_after_s=self._retry_after_s)
        self._taken += size

    def give_back(self, size: int) -> None:
        self._taken -= size
