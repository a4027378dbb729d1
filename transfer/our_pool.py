"""Our pool as it is compared with a peer's ticket: whether its pages are taken whole, in grains, or not at all."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.handshake import PoolShape, RegionTicket
from transfer.layout import Cut, LayoutMismatch, cut_between


@dataclass(frozen=True, kw_only=True)
class OurPool:
    """`layout` is the fingerprint of its pages: those of an equal one mean the same. `shape` says what they mean."""

    page_bytes: int
    num_pages: int
    layout: str
    shape: PoolShape | None

    def cut(self, peer: str, ticket: RegionTicket) -> Cut | None:
        """How pages of `peer` are taken apart; None when they are taken whole. Raises `ValueError` when nothing of them
        means anything in our pool."""
        ours, theirs = (self.layout, self.page_bytes), (ticket.layout, ticket.page_bytes)
        if ours == theirs:
            return None
        if self.shape is None or ticket.shape is None:
            raise ValueError(
                f"replica {peer} has KV pages of layout and bytes {theirs}, this one {ours}; "
                "run the same model, dtype and page size on both"
            )
        try:
            return cut_between(ticket.shape, ticket.page_bytes, self.shape, self.page_bytes)
        except LayoutMismatch as error:
            raise ValueError(f"replica {peer}: {error}") from error

    def num_units(self, cut: Cut | None) -> int:
        """Pages or grains, whichever is moved."""
        return self.num_pages * (1 if cut is None else cut.target.per_page)

    def unit_bytes(self, cut: Cut | None) -> int:
        """Of a page or a grain, whichever is moved."""
        return self.page_bytes if cut is None else cut.target.grain_bytes
