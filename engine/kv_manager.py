"""Which pages a request holds: the one place where the books of pages and the prefix cache are changed together.

A request gets pages by `attach` (what the cache has of it, locked, and fresh ones for the rest) and `grow`, lends whole
computed pages to the cache while it runs by `publish`, and gives all back by `release`, `drop` or `quarantine`. After
every call each page is free, in the cache, in exactly one request's table as its own, or in quarantine.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from engine.page_allocator import PageAllocator, PageState
from engine.radix_cache import Match, RadixCache
from engine.request import Request


class KVManager:
    """Pages of `num_pages` and the prefixes kept in them. With `enable_prefix_cache` off nothing is kept or found."""

    def __init__(self, *, num_pages: int, page_size: int, enable_prefix_cache: bool) -> None:
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)
        self.cache = RadixCache(page_size=page_size)
        self.quarantined: dict[Hashable, list[int]] = {}
        """Pages in quarantine by the key of the request that owned them."""
        self._keeps = enable_prefix_cache

    @property
    def num_available(self) -> int:
        """Pages that can be had now: free ones and those the cache can give up."""
        return self.allocator.num_free + self.cache.num_evictable

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def match(self, request: Request, *, max_tokens: int) -> Match:
        """What the cache has of the request's first `max_tokens` tokens, in whole pages."""
        return self.cache.match(request.tokens, namespace=request.namespace, max_pages=max_tokens // self.page_size)

    def is_short(self, request: Request, *, headroom: int) -> bool:
        """Whether `find_room` would surely find none, known at once: as many pages were missing the last time as cannot
        be had now, and nothing was inserted into the cache since. Keeps a long queue cheap.
        """
        inserted, missing = request.room_sought
        return inserted == self.cache.num_insertions and missing + headroom > self.num_available

    def find_room(self, request: Request, *, max_tokens: int, headroom: int) -> Match | None:
        """What to `attach` now so that `headroom` pages can still be had afterwards; None when it does not fit.

        The cache is searched among the first `max_tokens` tokens.
        """
        match = self.match(request, max_tokens=max_tokens)
        missing = self.pages_for(request.num_tokens) - len(match.pages)
        request.room_sought = (self.cache.num_insertions, missing)
        return match if missing + headroom <= self.num_available - match.num_unlocked else None

    def attach(self, request: Request, match: Match) -> None:
        """Give the request, which holds none, pages for all of its tokens; the match is `find_room`'s of just now."""
        assert request.table.count == 0, f"request {request.key!r} has pages already"
        node = self.cache.lock(match)
        if node is not None:
            request.table.share(match.pages, node)
        request.num_computed = len(match.pages) * self.page_size
        missing = self.pages_for(request.num_tokens) - len(match.pages)
        request.table.append(self._allocate(missing, after=None))

    def grow(self, request: Request) -> bool:
        """Make room for all of the request's tokens; False, with nothing changed, when there are no such pages."""
        table = request.table
        missing = self.pages_for(request.num_tokens) - table.count
        if missing <= 0:
            return True
        if missing > self.num_available:
            return False
        table.append(self._allocate(missing, after=int(table.ids[-1]) if table.count else None))
        return True

    def publish(self, request: Request) -> None:
        """Lend the request's whole computed pages to the cache, so that others find them while it runs.

        Where the cache has the same prefix already, the request goes over to the cache's pages and its own are freed;
        but a retained request's pages may be being read by a peer, so then nothing is done.
        """
        table, count = request.table, request.num_computed // self.page_size
        if not self._keeps or count <= table.num_shared:
            return
        if request.retain and len(self.match(request, max_tokens=request.num_computed).pages) > table.num_shared:
            return
        old_node, old_shared, given = table.node, table.num_shared, table.to_list()[:count]
        insertion = self.cache.insert(request.tokens, given, namespace=request.namespace)
        self.cache.lock_node(insertion.node)
        if old_node is not None:
            self.cache.unlock(old_node)
        table.share(insertion.pages, insertion.node)
        self.allocator.cache(given[insertion.num_known :])
        self.allocator.free(given[old_shared : insertion.num_known])

    def release(self, request: Request) -> None:
        """Take all pages back; the whole ones that are computed go to the cache, unless it has their like."""
        table, count = request.table, request.num_computed // self.page_size
        shared = table.num_shared
        if self._keeps and count > shared:
            given = table.to_list()
            insertion = self.cache.insert(request.tokens, given[:count], namespace=request.namespace)
            self.allocator.cache(given[insertion.num_known : count])
            self.allocator.free(given[shared : insertion.num_known] + given[count:])
            self._let_go(request)
        else:
            self.drop(request)

    def drop(self, request: Request) -> None:
        """Take all pages back and keep nothing of what is in the request's own."""
        self.allocator.free(request.table.own())
        self._let_go(request)

    def quarantine(self, request: Request) -> None:
        """Take the request's pages, but let nobody have its own ones before `drained`."""
        own = request.table.own()
        self.allocator.quarantine(own)
        self.quarantined[request.key] = own
        self._let_go(request)

    def drained(self, key: Hashable) -> None:
        """Every write to the pages quarantined under `key` has ended: free them. Raises KeyError for an unknown key."""
        self.allocator.drained(self.quarantined.pop(key))

    def flush_cache(self) -> int:
        """Drop every prefix that no request holds; returns the number of pages freed."""
        evicted = self.cache.evict(self.cache.num_evictable)
        self.allocator.evict(evicted)
        return len(evicted)

    def num_cached_tokens(self, tokens: Sequence[int], *, namespace: str) -> int:
        """Leading tokens whose KV the cache has, in whole pages."""
        match = self.cache.match(np.asarray(tokens, np.int64), namespace=namespace, max_pages=len(tokens))
        return len(match.pages) * self.page_size

    def count(self, state: PageState) -> int:
        """Pages in a state now."""
        return self.allocator.count(state)

    def _allocate(self, count: int, *, after: int | None) -> list[int]:
        shortage = count - self.allocator.num_free
        if shortage > 0:
            self.allocator.evict(self.cache.evict(shortage))
        return self.allocator.allocate(count, after=after)

    def _let_go(self, request: Request) -> None:
        if request.table.node is not None:
            self.cache.unlock(request.table.node)
        request.table.clear()
        request.num_computed = 0
