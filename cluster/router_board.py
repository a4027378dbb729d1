"""What routers tell each other, as the directory keeps it: the last report of each. Pure: no Ray, no clock."""

from __future__ import annotations

from protocol.membership import RouterReport


class RouterBoard:
    """A router that has been silent for `timeout_s` is forgotten. Times are seconds on the caller's clock."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._reports: dict[str, tuple[float, RouterReport]] = {}

    def exchange(self, report: RouterReport, now: float) -> list[RouterReport]:
        """Take a router's report; the last one of every router that lives, its own among them."""
        self._reports[report.key] = (now, report)
        self._reports = {
            key: (heard_at, each)
            for key, (heard_at, each) in self._reports.items()
            if now - heard_at <= self._timeout_s
        }
        return [each for _, each in self._reports.values()]
