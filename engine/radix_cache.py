"""The prefix cache: a radix tree over KV pages.

An edge carries the tokens of one or more whole pages and the pages that hold their KV, so a path from a root spells a
prefix. Each namespace has a root of its own and shares nothing with the others. Nodes on the path of a running request
are locked: a lock counts on the node and on all above it, so an unlocked node has only unlocked nodes below it and
every page of it can be evicted, last page of the least recently used leaf first.

Tokens are compared as bytes, a page's worth at a time to find a child and a whole edge at once to follow it, so a match
or an insert costs time in proportion to the prompt's length. The tree owns the pages it holds; moving them between
states in the books is up to `engine/kv_manager.py`.

The idea of a radix tree with counted locks and least-recently-used leaves is from SGLang (Zheng et al., 2024).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


class RadixNode:
    """One edge and its end. `key` holds the edge's tokens as int64 bytes, `pages` their pages."""

    __slots__ = ("children", "key", "last_used", "locks", "number", "pages", "parent", "queued")

    def __init__(self, key: bytes, pages: list[int], parent: RadixNode | None, number: int, last_used: int) -> None:
        self.key = key
        self.pages = pages
        self.parent = parent
        self.number = number
        self.last_used = last_used
        self.children: dict[bytes, RadixNode] = {}
        """By the bytes of the first page of each child's key."""
        self.locks = 0
        self.queued = False
        """Whether the eviction queue has an entry for this node."""


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix. True until the tree next changes; `RadixCache.lock` makes it last."""

    pages: list[int]
    num_unlocked: int
    """How many of the pages could be evicted now: locking the match takes them from what eviction can give."""
    node: RadixNode
    depth: int
    """Pages of `node` that match; all of them but for a match that ends inside an edge."""


@dataclass(frozen=True, slots=True)
class Insertion:
    """What became of an inserted prefix."""

    pages: list[int]
    """The tree's pages of the whole prefix: its own where it had them already."""
    num_known: int
    """Leading pages the tree had already; it took the given ones from here on."""
    node: RadixNode
    """Where the prefix ends."""


class RadixCache:
    """Prefixes of whole pages and the pages that hold them. Deterministic; not for use by several threads."""

    def __init__(self, *, page_size: int) -> None:
        self.page_size = page_size
        self._key_bytes = page_size * np.dtype(np.int64).itemsize
        self._roots: dict[str, RadixNode] = {}
        self._clock = 0
        self._next_number = 0
        self._queue: list[tuple[int, int, RadixNode]] = []
        """Heap of (last used, number, leaf): candidates for eviction, checked again when taken."""
        self.num_pages = 0
        """Pages the tree holds."""
        self.num_evictable = 0
        """Pages of unlocked nodes."""
        self.num_insertions = 0
        """Only an insertion makes a match longer; what compares this number need not match again."""

    def match(self, tokens: npt.NDArray[np.int64], *, namespace: str, max_pages: int) -> Match:
        """The longest cached prefix of `tokens` in whole pages, `max_pages` at most; changes nothing."""
        node = self._roots.get(namespace)
        if node is None:
            return Match(pages=[], num_unlocked=0, node=self._new_node(b"", [], None), depth=0)
        key, width = self._key_of(tokens, max_pages), self._key_bytes
        pages: list[int] = []
        unlocked, depth = 0, 0
        while len(pages) * width < len(key):
            start = len(pages) * width
            child = node.children.get(key[start : start + width])
            if child is None:
                break
            node, depth = child, self._common_pages(child.key, key, start)
            pages += node.pages[:depth]
            unlocked += depth if node.locks == 0 else 0
            if depth < len(node.pages):
                break
        return Match(pages=pages, num_unlocked=unlocked, node=node, depth=depth)

    def lock(self, match: Match) -> RadixNode | None:
        """Keep the matched pages until `unlock` of the node returned; None when nothing matched."""
        if not match.pages:
            return None
        node = self._split(match.node, match.depth) if match.depth < len(match.node.pages) else match.node
        self._touch(node)
        self.lock_node(node)
        return node

    def lock_node(self, node: RadixNode) -> None:
        """Lock the path that ends at `node`."""
        step: RadixNode | None = node
        while step is not None and step.parent is not None:
            if step.locks == 0:
                self.num_evictable -= len(step.pages)
            step.locks += 1
            step = step.parent

    def unlock(self, node: RadixNode) -> None:
        """Take one lock back from the path that ends at `node`."""
        step: RadixNode | None = node
        while step is not None and step.parent is not None:
            assert step.locks > 0, "a node of the prefix cache was unlocked more often than locked"
            step.locks -= 1
            if step.locks == 0:
                self.num_evictable += len(step.pages)
                self._enqueue(step)
            step = step.parent

    def insert(self, tokens: npt.NDArray[np.int64], pages: Sequence[int], *, namespace: str) -> Insertion:
        """Hold the prefix `tokens[: len(pages) * page_size]`, at least one page; the tree takes those pages it lacks.

        The given pages before `Insertion.num_known` stay the caller's, unless they are the tree's own already.
        """
        assert pages, "a prefix of no pages has no place in the tree"
        key, width = self._key_of(tokens, len(pages)), self._key_bytes
        assert len(key) == len(pages) * width, "a page was inserted without all of its tokens"
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = self._new_node(b"", [], None)
        path: list[int] = []
        while len(path) < len(pages):
            start = len(path) * width
            child = node.children.get(key[start : start + width])
            if child is None:
                break
            depth = self._common_pages(child.key, key, start)
            node = self._split(child, depth) if depth < len(child.pages) else child
            path += node.pages
        known = len(path)
        self.num_insertions += 1
        if known < len(pages):
            node = self._new_node(key[known * width :], list(pages[known:]), node)
            assert node.parent is not None
            node.parent.children[node.key[:width]] = node
            path += node.pages
            self.num_pages += len(node.pages)
            self.num_evictable += len(node.pages)
        self._touch(node)
        self._enqueue(node)
        return Insertion(pages=path, num_known=known, node=node)

    def evict(self, count: int) -> list[int]:
        """Give up to `count` unlocked pages back to the caller, least recently used prefixes first."""
        evicted: list[int] = []
        while len(evicted) < count and self._queue:
            last_used, _, node = heapq.heappop(self._queue)
            node.queued = False
            if node.locks or node.children or not node.pages:
                continue  # it will be queued again when it becomes an unlocked leaf
            if node.last_used != last_used:
                self._enqueue(node)
                continue
            taken = min(count - len(evicted), len(node.pages))
            kept = len(node.pages) - taken
            evicted += node.pages[kept:]
            if kept:
                node.pages = node.pages[:kept]
                node.key = node.key[: kept * self._key_bytes]
                self._enqueue(node)
            else:
                self._remove_leaf(node)
        self.num_pages -= len(evicted)
        self.num_evictable -= len(evicted)
        return evicted

    def nodes(self) -> list[tuple[str, RadixNode]]:
        """(namespace, node) of every node but the roots, parents first, for the auditor."""
        found: list[tuple[str, RadixNode]] = []
        for namespace, root in self._roots.items():
            stack = list(root.children.values())
            while stack:
                node = stack.pop()
                found.append((namespace, node))
                stack += node.children.values()
        return found

    def _key_of(self, tokens: npt.NDArray[np.int64], max_pages: int) -> bytes:
        whole = min(len(tokens) // self.page_size, max_pages) * self.page_size
        return tokens[:whole].tobytes()

    def _common_pages(self, edge: bytes, key: bytes, start: int) -> int:
        """Whole pages that `edge` and `key[start:]` have in common from their beginnings."""
        width = self._key_bytes
        length = min(len(edge), len(key) - start)
        if edge[:length] == key[start : start + length]:
            return length // width
        ours = np.frombuffer(edge, np.int64, length // 8)
        theirs = np.frombuffer(key, np.int64, length // 8, start)
        return int(np.argmax(ours != theirs)) // self.page_size

    def _new_node(self, key: bytes, pages: list[int], parent: RadixNode | None) -> RadixNode:
        self._next_number += 1
        return RadixNode(key, pages, parent, self._next_number, self._clock)

    def _split(self, node: RadixNode, depth: int) -> RadixNode:
        """Cut an edge after its first `depth` pages; the new upper node is returned, `node` keeps the rest."""
        parent, width = node.parent, self._key_bytes
        assert parent is not None
        upper = self._new_node(node.key[: depth * width], node.pages[:depth], parent)
        upper.locks, upper.last_used = node.locks, node.last_used
        parent.children[upper.key[:width]] = upper
        node.key, node.pages, node.parent = node.key[depth * width :], node.pages[depth:], upper
        upper.children[node.key[:width]] = node
        return upper

    def _touch(self, node: RadixNode) -> None:
        """Mark the path to `node` as used just now."""
        self._clock += 1
        step: RadixNode | None = node
        while step is not None:
            step.last_used = self._clock
            step = step.parent

    def _enqueue(self, node: RadixNode) -> None:
        if not (node.queued or node.locks or node.children or node.parent is None):
            node.queued = True
            entry: tuple[int, int, Any] = (node.last_used, node.number, node)
            heapq.heappush(self._queue, entry)

    def _remove_leaf(self, node: RadixNode) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key[: self._key_bytes]]
        node.pages, node.parent = [], None
        if parent.parent is not None:
            self._enqueue(parent)
        elif not parent.children:
            self._roots = {name: root for name, root in self._roots.items() if root is not parent}
