"""Compiled grammars by content, made in worker threads.

`request` never blocks: the answer comes by a callback, at once on the caller's thread where the grammar is known and
else on a worker's. A grammar that several requests want at the same time is compiled once. What is least recently used
goes when all take more than `max_bytes`; a request that has its grammar keeps it. Refusals are remembered too.

Lifecycle: the threads live from the first request to `close`. A compilation cannot be interrupted, so whoever waits
for one keeps a deadline of its own; what comes too late for it is still kept for the next.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from engine.grammar.compiled import CompiledGrammar
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.errors import GrammarRefused
from protocol.sampling import Grammar

Outcome = CompiledGrammar | Exception
_Key = tuple[str, str]
_REFUSAL_BYTES = 4096
"""What a remembered refusal counts as, its text apart."""


@dataclass(frozen=True)
class CacheCounters:
    """Of one cache, since it was made."""

    hits: int
    misses: int
    refused: int
    compiled_bytes: int


class GrammarCache:
    """Shared by all requests of a replica; every method from any thread."""

    def __init__(
        self, compiler: GrammarCompiler, *, max_bytes: int = 256 << 20, num_threads: int = 2, max_pending: int = 64
    ) -> None:
        """At most `max_pending` grammars wait to be compiled."""
        self._compiler = compiler
        self._max_bytes = max_bytes
        self._num_threads = num_threads
        self._max_pending = max_pending
        self._lock = threading.Lock()
        self._known: OrderedDict[_Key, Outcome] = OrderedDict()
        self._bytes = 0
        self._hits = self._misses = self._refused = 0
        self._pending: dict[_Key, list[Callable[[Outcome], None]]] = {}
        self._work: queue.SimpleQueue[Grammar | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    @property
    def counters(self) -> CacheCounters:
        with self._lock:
            return CacheCounters(self._hits, self._misses, self._refused, self._bytes)

    def request(self, grammar: Grammar, then: Callable[[Outcome], None]) -> bool:
        """Call `then` once with the compiled grammar, or with why there is none; False when too many wait already."""
        key = (grammar.kind, grammar.text)
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._hits += 1
                self._known.move_to_end(key)
            elif key in self._pending:
                self._hits += 1
                self._pending[key].append(then)
                return True
            elif len(self._pending) >= self._max_pending:
                return False
            else:
                self._misses += 1
                self._pending[key] = [then]
                self._start_threads()
                self._work.put(grammar)
                return True
        then(known)
        return True

    def close(self, timeout_s: float = 5.0) -> None:
        """End the threads; one that compiles is left to itself after `timeout_s`."""
        with self._lock:
            threads, self._threads = self._threads, []
            for _ in threads:
                self._work.put(None)
        for thread in threads:
            thread.join(timeout_s)

    def _start_threads(self) -> None:
        while len(self._threads) < self._num_threads:
            thread = threading.Thread(target=self._run, name="grammar-compiler", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self) -> None:
        while (grammar := self._work.get()) is not None:
            key = (grammar.kind, grammar.text)
            try:
                outcome: Outcome = self._compiler.compile(grammar)
            except Exception as error:
                outcome = error
            with self._lock:
                waiting = self._pending.pop(key)
                self._keep(key, outcome)
            for then in waiting:
                then(outcome)

    def _keep(self, key: _Key, outcome: Outcome) -> None:
        if not isinstance(outcome, CompiledGrammar):
            self._refused += 1
            if not isinstance(outcome, GrammarRefused):
                return  # of the machine, not of the grammar: it may go well the next time
        self._known[key] = outcome
        self._bytes += _size(key, outcome)
        while self._bytes > self._max_bytes and len(self._known) > 1:
            self._bytes -= _size(*self._known.popitem(last=False))


def _size(key: _Key, outcome: Outcome) -> int:
    text = 2 * len(key[1])
    return text + (outcome.num_bytes if isinstance(outcome, CompiledGrammar) else _REFUSAL_BYTES)
