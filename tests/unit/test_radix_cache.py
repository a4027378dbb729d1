"""The prefix tree against a plain dictionary of prefixes, and its eviction order and cost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.radix_cache import RadixCache, RadixNode

_PAGE = 2


def _tokens(*pages: int) -> npt.NDArray[np.int64]:
    """A page of tokens for each number: equal numbers are equal pages."""
    return np.repeat(np.array(pages, np.int64), _PAGE)


def _match(cache: RadixCache, *pages: int, namespace: str = "") -> list[int]:
    return cache.match(_tokens(*pages), namespace=namespace, max_pages=len(pages)).pages


def test_the_longest_prefix_of_whole_pages_is_found() -> None:
    cache = RadixCache(page_size=_PAGE)
    cache.insert(_tokens(1, 2, 3), [10, 11, 12], namespace="")
    assert _match(cache, 1, 2, 3, 4) == [10, 11, 12]
    assert _match(cache, 1, 2, 9) == [10, 11]
    assert _match(cache, 2) == []
    assert cache.match(_tokens(1, 2)[:3], namespace="", max_pages=9).pages == [10], "half a page is no page"
    assert cache.match(_tokens(1, 2, 3), namespace="", max_pages=2).pages == [10, 11]


def test_namespaces_share_nothing() -> None:
    cache = RadixCache(page_size=_PAGE)
    cache.insert(_tokens(1, 2), [10, 11], namespace="a")
    assert _match(cache, 1, 2, namespace="b") == []
    cache.insert(_tokens(1, 2), [20, 21], namespace="b")
    assert _match(cache, 1, 2, namespace="a") == [10, 11]
    assert _match(cache, 1, 2, namespace="b") == [20, 21]


def test_an_insert_takes_only_what_the_tree_lacks() -> None:
    cache = RadixCache(page_size=_PAGE)
    cache.insert(_tokens(1, 2, 3), [10, 11, 12], namespace="")
    insertion = cache.insert(_tokens(1, 2, 7, 8), [20, 21, 22, 23], namespace="")
    assert insertion.pages == [10, 11, 22, 23]
    assert insertion.num_known == 2
    assert cache.num_pages == 5


def test_the_least_recently_used_leaf_goes_first_from_its_end() -> None:
    cache = RadixCache(page_size=_PAGE)
    cache.insert(_tokens(1, 2, 3), [10, 11, 12], namespace="")
    cache.insert(_tokens(1, 5), [20, 21], namespace="")
    node = cache.lock(cache.match(_tokens(1, 2, 3), namespace="", max_pages=3))
    assert node is not None
    cache.unlock(node)  # used just now, so the other branch is older
    assert cache.evict(2) == [21, 12]
    assert cache.evict(9) == [11, 10]
    assert cache.num_pages == cache.num_evictable == 0
    assert cache.nodes() == []


def test_a_locked_prefix_stays() -> None:
    cache = RadixCache(page_size=_PAGE)
    cache.insert(_tokens(1, 2, 3), [10, 11, 12], namespace="")
    node = cache.lock(cache.match(_tokens(1, 2), namespace="", max_pages=2))
    assert node is not None
    assert cache.num_evictable == 1
    assert cache.evict(9) == [12]
    assert cache.evict(9) == []
    cache.unlock(node)
    assert sorted(cache.evict(9)) == [10, 11]


def test_a_match_says_how_much_of_it_could_be_evicted() -> None:
    cache = RadixCache(page_size=_PAGE)
    cache.insert(_tokens(1, 2, 3), [10, 11, 12], namespace="")
    cache.lock(cache.match(_tokens(1), namespace="", max_pages=1))
    assert cache.match(_tokens(1, 2), namespace="", max_pages=2).num_unlocked == 1


def test_long_prompts_cost_time_in_proportion_to_their_length() -> None:
    cache = RadixCache(page_size=_PAGE)
    tokens = np.arange(200_000, dtype=np.int64)
    cache.insert(tokens, list(range(100_000)), namespace="")
    assert len(cache.match(tokens, namespace="", max_pages=100_000).pages) == 100_000
    assert len(cache.nodes()) == 1, "a prefix without branches is one edge, compared in one piece"


class RadixAgainstDictionary(RuleBasedStateMachine):
    """A dictionary from every cached prefix to its last page, and the paths that are locked."""

    locks = Bundle("locks")

    def __init__(self) -> None:
        super().__init__()
        self.cache = RadixCache(page_size=_PAGE)
        self.plain: dict[tuple[str, tuple[int, ...]], int] = {}
        self.locked: list[tuple[str, tuple[int, ...]]] = []
        self.next_page = 0

    prefixes = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
    names = st.sampled_from(["", "x"])

    def longest(self, name: str, prefix: tuple[int, ...]) -> list[int]:
        pages = []
        for end in range(1, len(prefix) + 1):
            if (name, prefix[:end]) not in self.plain:
                break
            pages.append(self.plain[name, prefix[:end]])
        return pages

    def is_locked(self, name: str, prefix: tuple[int, ...]) -> bool:
        return any(n == name and held[: len(prefix)] == prefix for n, held in self.locked)

    @rule(name=names, prefix=prefixes)
    def insert(self, name: str, prefix: tuple[int, ...]) -> None:
        given = list(range(self.next_page, self.next_page + len(prefix)))
        self.next_page += len(prefix)
        known = self.longest(name, prefix)
        insertion = self.cache.insert(_tokens(*prefix), given, namespace=name)
        assert insertion.num_known == len(known)
        assert insertion.pages == known + given[len(known) :]
        for end in range(len(known) + 1, len(prefix) + 1):
            self.plain[name, prefix[:end]] = given[end - 1]

    @rule(name=names, prefix=prefixes)
    def match(self, name: str, prefix: tuple[int, ...]) -> None:
        found = self.cache.match(_tokens(*prefix), namespace=name, max_pages=len(prefix))
        assert found.pages == self.longest(name, prefix)
        held = [prefix[:end] for end in range(1, len(found.pages) + 1)]
        assert found.num_unlocked == sum(not self.is_locked(name, each) for each in held)

    @rule(target=locks, name=names, prefix=prefixes)
    def lock(self, name: str, prefix: tuple[int, ...]) -> tuple[RadixNode | None, tuple[str, tuple[int, ...]]]:
        found = self.cache.match(_tokens(*prefix), namespace=name, max_pages=len(prefix))
        held = (name, prefix[: len(found.pages)])
        node = self.cache.lock(found)
        if node is not None:
            self.locked.append(held)
        return node, held

    @rule(lock=consumes(locks))
    def unlock(self, lock: tuple[RadixNode | None, tuple[str, tuple[int, ...]]]) -> None:
        node, held = lock
        if node is not None:
            self.locked.remove(held)
            self.cache.unlock(node)

    @rule(count=st.integers(1, 5))
    def evict(self, count: int) -> None:
        free = {key for key in self.plain if not self.is_locked(*key)}
        evicted = self.cache.evict(count)
        assert len(evicted) == min(count, len(free)), "unlocked pages can all be had, whatever their place"
        for key in [key for key, page in self.plain.items() if page in evicted]:
            assert key in free
            del self.plain[key]

    @invariant()
    def books(self) -> None:
        assert self.cache.num_pages == len(self.plain)
        assert self.cache.num_evictable == sum(not self.is_locked(*key) for key in self.plain)
        for name, prefix in self.plain:
            assert len(prefix) == 1 or (name, prefix[:-1]) in self.plain, "a page outlived the prefix it follows"
        assert sorted(page for _, node in self.cache.nodes() for page in node.pages) == sorted(self.plain.values())


TestRadixAgainstDictionary = RadixAgainstDictionary.TestCase
TestRadixAgainstDictionary.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
