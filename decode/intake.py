"""The pages of one prompt on their way into decode's pool: which are offered, being copied, and here."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from protocol.rooms import Offer


class PageStage(enum.IntEnum):
    WANTED = 0
    COPYING = 1
    HERE = 2


class PageIntake:
    """Pages by their index in the prompt, `num_pages` of them."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._stages = [PageStage.WANTED] * num_pages
        self._offers: list[tuple[int, int] | None] = [None] * num_pages
        self._num_here = 0

    @property
    def is_complete(self) -> bool:
        return self._num_here == self.num_pages

    def misfit(self, offer: Offer) -> str:
        """What is wrong with an offer for this prompt; empty when nothing is."""
        end = offer.first + len(offer.pages)
        if offer.first < 0 or end > self.num_pages:
            return f"pages {offer.first} to {end} were offered of a prompt of {self.num_pages} pages"
        if offer.checksums and len(offer.checksums) != len(offer.pages):
            return f"an offer of {len(offer.pages)} pages came with {len(offer.checksums)} checksums"
        return ""

    def note(self, offer: Offer) -> None:
        """Remember where offered pages lie; `misfit` has nothing to say about the offer."""
        checksums = offer.checksums or [0] * len(offer.pages)
        for index, source in enumerate(zip(offer.pages, checksums, strict=True), start=offer.first):
            self._offers[index] = source

    def begin(self, num_held: int) -> None:
        """Pages were granted: the first `num_held` are here already, no other is."""
        self._stages = [PageStage.HERE] * num_held + [PageStage.WANTED] * (self.num_pages - num_held)
        self._num_here = num_held

    def take_offered(self) -> list[tuple[int, int, int]]:
        """(index, source page, checksum) of every page offered and wanted; they count as being copied from now on."""
        taken: list[tuple[int, int, int]] = []
        for index, (stage, source) in enumerate(zip(self._stages, self._offers, strict=True)):
            if stage is PageStage.WANTED and source is not None:
                self._stages[index] = PageStage.COPYING
                taken.append((index, *source))
        return taken

    def landed(self, indices: Iterable[int]) -> None:
        """These pages were copied and verified."""
        for index in indices:
            assert self._stages[index] is PageStage.COPYING, f"page {index} landed, but no copy of it was running"
            self._stages[index] = PageStage.HERE
            self._num_here += 1
