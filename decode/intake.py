"""A prompt's KV on its way into decode's pool: which of it is offered, being copied, and here.

It is counted in pages where both pools' pages have the same size, else in grains: as many tokens as divide both.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

from protocol.rooms import Offer
from transfer.layout import grain_tokens


class PageStage(enum.IntEnum):
    WANTED = 0
    COPYING = 1
    HERE = 2


class PageIntake:
    """Grains by their index in a prompt of `num_tokens` tokens; `source_page_size` is prefill's."""

    def __init__(self, num_tokens: int, *, page_size: int, source_page_size: int) -> None:
        grain = grain_tokens(page_size, source_page_size)
        self.grain_tokens = 0 if page_size == source_page_size else grain
        """As `FetchJob` and `Join` say it."""
        self.num_pages = -(-num_tokens // source_page_size)
        """Of the prompt, in prefill's pool."""
        self._per_page, self._per_source = page_size // grain, source_page_size // grain
        self._num_grains = -(-num_tokens // grain)
        self._stages = [PageStage.WANTED] * self._num_grains
        self._offers: list[tuple[int, int] | None] = [None] * self._num_grains
        self._num_held = self._num_here = 0

    @property
    def is_complete(self) -> bool:
        return self._num_here == self._num_grains

    @property
    def num_missing(self) -> int:
        """What is not here yet, copied or not."""
        return self._num_grains - self._num_here

    @property
    def held_pages(self) -> int:
        """Leading pages of prefill's of which nothing is needed."""
        return self._num_held // self._per_source

    def misfit(self, offer: Offer) -> str:
        """What is wrong with an offer for this prompt; empty when nothing is."""
        end = offer.first + len(offer.pages)
        if offer.first < 0 or end > self.num_pages:
            return f"pages {offer.first} to {end} were offered of a prompt of {self.num_pages} pages"
        if offer.checksums and len(offer.checksums) != len(offer.pages) * self._per_source:
            return f"an offer of {len(offer.pages)} pages came with {len(offer.checksums)} checksums"
        return ""

    def note(self, offer: Offer) -> None:
        """Remember where offered pages lie; `misfit` has nothing to say about the offer."""
        sources = [page * self._per_source + part for page in offer.pages for part in range(self._per_source)]
        checksums = offer.checksums or [0] * len(sources)
        for index, source in enumerate(zip(sources, checksums, strict=True), start=offer.first * self._per_source):
            if index < self._num_grains:  # the last page may have more than the prompt
                self._offers[index] = source

    def begin(self, num_held: int) -> None:
        """Pages were granted: the first `num_held` of ours are here already, no other is."""
        self._num_held = self._num_here = num_held * self._per_page
        wanted = self._num_grains - self._num_held
        self._stages = [PageStage.HERE] * self._num_held + [PageStage.WANTED] * wanted

    def take_offered(self) -> list[tuple[int, int, int]]:
        """(index, source, checksum) of everything offered and wanted; it counts as being copied from now on."""
        taken: list[tuple[int, int, int]] = []
        for index, (stage, source) in enumerate(zip(self._stages, self._offers, strict=True)):
            if stage is PageStage.WANTED and source is not None:
                self._stages[index] = PageStage.COPYING
                taken.append((index, *source))
        return taken

    def target(self, index: int, pages: Sequence[int]) -> int:
        """Where in our pool it goes, `pages` being those of the prompt."""
        return pages[index // self._per_page] * self._per_page + index % self._per_page

    def landed(self, indices: Iterable[int]) -> None:
        """These were copied and verified."""
        for index in indices:
            assert self._stages[index] is PageStage.COPYING, f"page {index} landed, but no copy of it was running"
            self._stages[index] = PageStage.HERE
            self._num_here += 1

    def count_pages(self, indices: Iterable[int]) -> int:
        """How many of our pages begin among these."""
        return sum(index % self._per_page == 0 for index in indices)
