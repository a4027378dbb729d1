"""Our pool as it is compared with a peer's ticket: whether its pages are taken whole, in grains, or not at all."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from protocol.handshake import PoolShape, RegionTicket
from transfer.int8_codec import Int8Codec
from transfer.jobs import Coded
from transfer.layout import Cut, LayoutMismatch, cut_between, whole_grid

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OurPool:
    """`shape` says what its pages mean. Where a side does not tell it, pages of an equal `layout`, which is their
    fingerprint, mean the same."""

    page_bytes: int
    num_pages: int
    layout: str
    shape: PoolShape | None
    codec: Int8Codec | None
    """Of KV that moves in 8 bits; None when none does."""

    def cut(self, peer: str, ticket: RegionTicket) -> Cut | None:
        """How pages of `peer` are taken apart; None when they are taken whole. Raises `ValueError` when nothing of them
        means anything in our pool."""
        if self.shape is None or ticket.shape is None:
            ours, theirs = (self.layout, self.page_bytes), (ticket.layout, ticket.page_bytes)
            if ours == theirs:
                return None
            raise ValueError(
                f"replica {peer} has KV pages of layout and bytes {theirs}, this one {ours}; "
                "run the same model, dtype and page size on both"
            )
        try:
            return cut_between(ticket.shape, ticket.page_bytes, self.shape, self.page_bytes)
        except LayoutMismatch as error:
            raise ValueError(f"replica {peer}: {error}") from error

    def coded(self, peer: str, ticket: RegionTicket, cut: Cut | None) -> Coded | None:
        """How pages of `peer`, or the grains of `cut`, are taken in 8 bits; None when they are taken as stored."""
        if self.codec is None or self.shape is None:
            return None
        if ticket.shape is None or not ticket.int8:
            logger.warning("replica %s gives no KV in 8 bits: it is taken as stored", peer)
            return None
        whole = Cut(
            source=whole_grid(ticket.shape, page_bytes=ticket.page_bytes, tokens=ticket.shape.page_size),
            target=whole_grid(self.shape, page_bytes=self.page_bytes, tokens=self.shape.page_size),
        )
        return Coded(cut=cut or whole, codec=self.codec)

    def num_units(self, cut: Cut | None) -> int:
        """Pages or grains, whichever is moved."""
        return self.num_pages * (1 if cut is None else cut.target.per_page)

    def unit_bytes(self, cut: Cut | None) -> int:
        """Of a page or a grain, whichever is moved."""
        return self.page_bytes if cut is None else cut.target.grain_bytes
