"""What routers tell each other by way of the directory, once a second: `cluster/` carries it there and back."""

from __future__ import annotations

from collections.abc import Iterable

from protocol.membership import RouterReport
from router.streams.moves import StreamMoves
from router.tenants import TenantBook


class Peering:
    """One router's side of it."""

    def __init__(self, *, router_key: str, moves: StreamMoves, tenants: TenantBook) -> None:
        self._router_key = router_key
        self._moves = moves
        self._tenants = tenants

    def report(self) -> RouterReport:
        return RouterReport(self._router_key, self._moves.address, self._tenants.report())

    def take(self, reports: Iterable[RouterReport]) -> None:
        """What all routers that live have said last, this one among them."""
        others = [report for report in reports if report.key != self._router_key]
        self._moves.take_reports(others)
        self._tenants.take_reports(others)
