"""Compiled grammars by content, made in worker threads.

`request` never blocks: the answer comes by a callback, at once on the caller's thread where there is next to nothing
to do and else on a worker's. A grammar that several requests want at the same time is compiled once. What is least
recently used goes when all take more than `max_bytes`; a request that has its constraint keeps what that needs.
Refusals are remembered too.

Lifecycle: the threads live from the first request to `close`. A compilation cannot be interrupted, so whoever waits
for one keeps a deadline of its own; what comes too late for it is still kept for the next.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.grammar.compiled import CompiledGrammar
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.constraint import Constraint
from engine.grammar.errors import GrammarRefused
from protocol.sampling import Grammar

Outcome = Constraint | Exception
_Key = tuple[str, str]
_Known = CompiledGrammar | GrammarRefused
_REFUSAL_BYTES = 4096
"""What a remembered refusal counts as, its text apart."""
_SHORT_REPLAY = 16
"""Tokens that can be replayed on the caller's thread."""


@dataclass(frozen=True)
class CacheCounters:
    """Of one cache, since it was made."""

    hits: int
    misses: int
    refused: int
    compiled_bytes: int


@dataclass(frozen=True)
class _Wanted:
    """One request's wish."""

    grammar: Grammar
    generated: Sequence[int]
    then: Callable[[Outcome], None]

    @property
    def key(self) -> _Key:
        return (self.grammar.kind, self.grammar.text)

    def answer(self, known: _Known | Exception) -> None:
        if isinstance(known, Exception):
            self.then(known)
            return
        try:
            outcome: Outcome = Constraint(known, self.generated)
        except Exception as error:
            outcome = error
        self.then(outcome)


class GrammarCache:
    """Shared by all requests of a replica; every method from any thread."""

    def __init__(
        self, compiler: GrammarCompiler, *, max_bytes: int = 256 << 20, num_threads: int = 2, max_waiting: int = 256
    ) -> None:
        """At most `max_waiting` requests wait for the threads."""
        self._compiler = compiler
        self._max_bytes = max_bytes
        self._num_threads = num_threads
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._known: OrderedDict[_Key, _Known] = OrderedDict()
        self._bytes = 0
        self._hits = self._misses = self._refused = 0
        self._compiling: dict[_Key, list[_Wanted]] = {}
        self._num_waiting = 0
        self._work: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    @property
    def counters(self) -> CacheCounters:
        with self._lock:
            return CacheCounters(self._hits, self._misses, self._refused, self._bytes)

    def request(self, grammar: Grammar, generated: Sequence[int], then: Callable[[Outcome], None]) -> bool:
        """Call `then` once with the grammar's state after `generated`, or with why there is none.

        False, and no call, when too many wait already.
        """
        wanted = _Wanted(grammar, generated, then)
        with self._lock:
            known = self._find(wanted.key)
            if known is None or len(generated) > _SHORT_REPLAY:
                return self._queue(wanted)
        wanted.answer(known)
        return True

    def is_compiling(self, grammar: Grammar) -> bool:
        """Whether a thread is at that grammar now."""
        with self._lock:
            return (grammar.kind, grammar.text) in self._compiling

    def close(self, timeout_s: float = 5.0) -> None:
        """End the threads; one that compiles is left to itself after `timeout_s`."""
        with self._lock:
            threads, self._threads = self._threads, []
            for _ in threads:
                self._work.put(None)
        for thread in threads:
            thread.join(timeout_s)

    # ---- under the lock ---------------------------------------------------------------------------------------

    def _find(self, key: _Key) -> _Known | None:
        known = self._known.get(key)
        if known is not None:
            self._hits += 1
            self._known.move_to_end(key)
        return known

    def _queue(self, wanted: _Wanted) -> bool:
        if self._num_waiting >= self._max_waiting:
            return False
        self._num_waiting += 1
        while len(self._threads) < self._num_threads:
            thread = threading.Thread(target=self._run, name="grammar-compiler", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._work.put(wanted)
        return True

    def _keep(self, key: _Key, known: _Known) -> None:
        self._known[key] = known
        self._bytes += _size(key, known)
        while self._bytes > self._max_bytes and len(self._known) > 1:
            self._bytes -= _size(*self._known.popitem(last=False))

    # ---- on a worker's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while (wanted := self._work.get()) is not None:
            for each, known in self._resolve(wanted):
                each.answer(known)
                with self._lock:
                    self._num_waiting -= 1

    def _resolve(self, wanted: _Wanted) -> list[tuple[_Wanted, _Known | Exception]]:
        """Whom to answer what; nobody where another thread compiles the same, which then answers this one too."""
        key = wanted.key
        try:
            self._compiler.prepare()
        except Exception as error:
            return [(wanted, error)]
        with self._lock:
            known = self._find(key)
            if known is not None:
                return [(wanted, known)]
            if key in self._compiling:
                self._compiling[key].append(wanted)
                return []
            self._misses += 1
            self._compiling[key] = [wanted]
        made: _Known | Exception
        try:
            made = self._compiler.compile(wanted.grammar)
        except Exception as error:
            made = error
        with self._lock:
            if isinstance(made, Exception):
                self._refused += 1
            if isinstance(made, _Known):  # what failed for another reason may go well the next time
                self._keep(key, made)
            return [(each, made) for each in self._compiling.pop(key)]


def _size(key: _Key, known: _Known) -> int:
    text = 2 * len(key[1])
    return text + (known.num_bytes if isinstance(known, CompiledGrammar) else _REFUSAL_BYTES)
