"""Do the books balance? Every page counted from its owners, and compared with the books.

`audit` walks everything, so it is for tests, for idle moments and for questions from outside, not for every step.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

from engine.kv_manager import KVManager
from engine.page_allocator import PageState
from engine.request import Request


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """Where every page is. `balanced` means that `problems` is empty."""

    balanced: bool
    free: int
    cached: int
    used: int
    quarantined: int
    total: int
    owners: dict[Hashable, list[int]]
    """Pages that belong to one request alone, by its key; pages in quarantine are among them."""
    problems: list[str]
    """What does not add up, in words."""

    @property
    def idle(self) -> bool:
        """Balanced, and no request owns anything: free + cached pages are all there are."""
        return self.balanced and self.free + self.cached == self.total


def audit(memory: KVManager, requests: Iterable[Request]) -> AuditReport:
    """Count every page of `memory` by its owner; `requests` are all that are registered."""
    found = _Ledger(memory.allocator.num_pages)
    problems: list[str] = []
    owners: dict[Hashable, list[int]] = {}
    locks: dict[int, int] = {}
    for request in requests:
        table = request.table
        if own := table.own():
            owners[request.key] = own
            found.enter(own, PageState.USED, f"request {request.key!r}")
        node = table.node
        path: list[int] = []
        while node is not None and node.parent is not None:
            locks[node.number] = locks.get(node.number, 0) + 1
            path = node.pages + path
            node = node.parent
        if path != table.to_list()[: table.num_shared]:
            problems.append(f"request {request.key!r} shares pages that are not those it locks")
        if request.num_computed > table.count * memory.page_size:
            problems.append(f"request {request.key!r} has computed more than its pages hold")
    for key, pages in memory.quarantined.items():
        owners[key] = owners.get(key, []) + pages
        found.enter(pages, PageState.QUARANTINED, f"quarantine of {key!r}")
    problems += _check_cache(memory, locks, found)

    states = memory.allocator.states()
    for page in np.flatnonzero(states != found.states).tolist():
        problems.append(
            f"page {page} is {PageState(states[page]).name} in the books but {PageState(found.states[page]).name} "
            f"by its owner, {found.owner.get(page, 'nobody')}"
        )
    free_by_runs = sorted(
        page for start, length in memory.allocator.free_runs() for page in range(start, start + length)
    )
    if free_by_runs != np.flatnonzero(states == PageState.FREE).tolist():
        problems.append("the free runs are not the pages that are FREE in the books")
    counts = [int(np.count_nonzero(states == state)) for state in PageState]
    if counts != [memory.count(state) for state in PageState]:
        problems.append(f"counted {counts} pages free, used, cached, quarantined, but the books say otherwise")
    problems += found.problems
    return AuditReport(
        balanced=not problems,
        free=counts[PageState.FREE],
        cached=counts[PageState.CACHED],
        used=counts[PageState.USED],
        quarantined=counts[PageState.QUARANTINED],
        total=memory.allocator.num_pages,
        owners=owners,
        problems=problems,
    )


def _check_cache(memory: KVManager, locks: dict[int, int], found: _Ledger) -> list[str]:
    problems: list[str] = []
    held = evictable = 0
    for _, node in memory.cache.nodes():
        found.enter(node.pages, PageState.CACHED, "the prefix cache")
        held += len(node.pages)
        evictable += len(node.pages) if node.locks == 0 else 0
        if node.locks != locks.get(node.number, 0):
            problems.append(f"a cached prefix has {node.locks} locks, but {locks.get(node.number, 0)} requests on it")
        if not (node.locks or node.children or node.queued):
            problems.append("an unlocked leaf of the cache is not queued for eviction")
    if (held, evictable) != (memory.cache.num_pages, memory.cache.num_evictable):
        problems.append(
            f"the cache holds {held} pages, {evictable} evictable, but says "
            f"{memory.cache.num_pages} and {memory.cache.num_evictable}"
        )
    return problems


class _Ledger:
    """Each page's state as its owners tell it."""

    def __init__(self, num_pages: int) -> None:
        self.states = np.full(num_pages, PageState.FREE, np.uint8)
        self.owner: dict[int, str] = {}
        self.problems: list[str] = []

    def enter(self, pages: list[int], state: PageState, owner: str) -> None:
        for page in pages:
            if page in self.owner:
                self.problems.append(f"page {page} belongs to both {self.owner[page]} and {owner}")
            self.owner[page] = owner
            self.states[page] = state
