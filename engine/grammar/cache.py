"""Compiled grammars by content, made in worker threads.

`request` never blocks: it answers at once where there is next to nothing to do, and else by a callback on a worker's
thread. A grammar that several requests want at the same time is compiled once, and one that nobody wants any more when
its turn comes is not compiled. What is made is kept within bounds (`known.py`); a request that has its constraint
keeps what that needs. Refusals are remembered too.

Lifecycle: the threads live from the first request to `close`. A compilation cannot be interrupted, so whoever waits
for one keeps a deadline of its own and gives it up: its thread then goes on at the lowest priority and ends with it,
and another takes its place, so that a few slow grammars do not keep out all others. What comes too late is still kept
for the next.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from engine.grammar.compiler import GrammarCompiler
from engine.grammar.constraint import Constraint
from engine.grammar.known import Key, Known, KnownGrammars
from engine.grammar.limits import GrammarLimits
from protocol.sampling import Grammar

Outcome = Constraint | Exception
_SHORT_REPLAY = 16
"""Tokens that can be replayed on the caller's thread."""


@dataclass(frozen=True)
class CacheCounters:
    """Of one cache, since it was made."""

    hits: int = 0
    compiles: int = 0
    compile_seconds: float = 0.0
    refused: int = 0
    """Compilations that failed."""
    dropped: int = 0
    """Grammars that nobody wanted any more when their turn came."""


@dataclass(eq=False)
class Wish:
    """One request's wish for a grammar."""

    grammar: Grammar
    generated: Sequence[int]
    then: Callable[[Outcome], None]
    waits: bool = field(default=False, init=False)
    """Whether a thread is to answer it; guarded by the cache's lock."""

    @property
    def key(self) -> Key:
        return (self.grammar.kind, self.grammar.text)


@dataclass(eq=False)
class _Compilation:
    """One under way; guarded by the cache's lock."""

    thread: threading.Thread
    wishes: list[Wish]


class GrammarCache:
    """Shared by all requests of a replica; every method from any thread."""

    def __init__(self, compiler: GrammarCompiler, limits: GrammarLimits | None = None) -> None:
        self._compiler = compiler
        self._limits = limits or GrammarLimits()
        self._lock = threading.Lock()
        self._known = KnownGrammars(self._limits.cache_bytes)
        self._counters = CacheCounters()
        self._compiling: dict[Key, _Compilation] = {}
        self._num_waiting = 0
        self._work: queue.SimpleQueue[Wish | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._num_slow = 0
        """Threads that have been replaced, and are not done yet."""

    @property
    def counters(self) -> CacheCounters:
        with self._lock:
            return self._counters

    @property
    def num_bytes(self) -> int:
        """What is kept takes."""
        with self._lock:
            return self._known.num_bytes

    @property
    def num_waiting(self) -> int:
        """Wishes that threads are to answer."""
        with self._lock:
            return self._num_waiting

    def request(
        self, grammar: Grammar, generated: Sequence[int], then: Callable[[Outcome], None]
    ) -> Outcome | Wish | None:
        """The grammar's state after `generated`, or why there is none.

        A wish where that takes time: `then` is called with it, once, on another thread. None when too many wait
        already.
        """
        wish = Wish(grammar, generated, then)
        with self._lock:
            known = self._find(wish.key)
            if known is None or len(generated) > _SHORT_REPLAY:
                return self._queue(wish)
        return self._outcome(wish, known)

    def withdraw(self, wish: Wish) -> None:
        """Nobody waits for the answer any more; it may still come, if it is on its way."""
        with self._lock:
            self._settle(wish)

    def is_compiling(self, grammar: Grammar) -> bool:
        """Whether a thread is at that grammar now."""
        with self._lock:
            return (grammar.kind, grammar.text) in self._compiling

    def give_up(self, grammar: Grammar) -> None:
        """It has taken too long: another thread takes the place of the one that is at it, where not as many again have
        been replaced already."""
        with self._lock:
            compilation = self._compiling.get((grammar.kind, grammar.text))
            if compilation is None or self._num_slow == self._limits.compile_threads:
                return
            if compilation.thread in self._threads:
                self._threads.remove(compilation.thread)
                self._num_slow += 1
                _lower_priority(compilation.thread)
                self._start_threads()

    def close(self, timeout_s: float = 5.0) -> None:
        """End the threads; one that compiles is left to itself after `timeout_s`."""
        with self._lock:
            threads, self._threads = self._threads, []
            for _ in threads:
                self._work.put(None)
        for thread in threads:
            thread.join(timeout_s)

    def _outcome(self, wish: Wish, known: Known | Exception) -> Outcome:
        if isinstance(known, Exception):
            return known
        try:
            return Constraint(known, wish.generated, budget_s=self._limits.follow_budget_s)
        except Exception as error:
            return error

    # ---- under the lock ---------------------------------------------------------------------------------------

    def _find(self, key: Key) -> Known | None:
        known = self._known.find(key)
        if known is not None:
            self._count(hits=1)
        return known

    def _queue(self, wish: Wish) -> Wish | None:
        if self._num_waiting >= self._limits.max_waiting:
            return None
        self._num_waiting += 1
        wish.waits = True
        self._start_threads()
        self._work.put(wish)
        return wish

    def _start_threads(self) -> None:
        while len(self._threads) < self._limits.compile_threads:
            thread = threading.Thread(target=self._run, name="grammar-compiler", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _settle(self, wish: Wish) -> None:
        self._num_waiting -= wish.waits
        wish.waits = False

    def _count(self, **more: float) -> None:
        self._counters = replace(
            self._counters, **{name: getattr(self._counters, name) + amount for name, amount in more.items()}
        )

    # ---- on a worker's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while (wish := self._work.get()) is not None:
            for each, known in self._resolve(wish):
                with self._lock:
                    waits = each.waits
                if waits:
                    each.then(self._outcome(each, known))
                    self.withdraw(each)
            if self._is_replaced():
                return

    def _is_replaced(self) -> bool:
        with self._lock:
            replaced = threading.current_thread() not in self._threads
            if replaced:
                self._num_slow -= 1
            return replaced

    def _resolve(self, wish: Wish) -> list[tuple[Wish, Known | Exception]]:
        """Whom to answer what; nobody where another thread compiles the same, which then answers this one too."""
        key = wish.key
        try:
            self._compiler.prepare()
        except Exception as error:
            return [(wish, error)]
        with self._lock:
            if not wish.waits:
                self._count(dropped=1)
                return []
            known = self._find(key)
            if known is not None:
                return [(wish, known)]
            if key in self._compiling:
                self._compiling[key].wishes.append(wish)
                return []
            self._compiling[key] = _Compilation(threading.current_thread(), [wish])
        began = time.perf_counter()
        made: Known | Exception
        try:
            made = self._compiler.compile(wish.grammar)
        except Exception as error:
            made = error
        with self._lock:
            self._count(compiles=1, compile_seconds=time.perf_counter() - began, refused=isinstance(made, Exception))
            if isinstance(made, Known):  # what failed for another reason may go well the next time
                self._known.keep(key, made)
            return [(each, made) for each in self._compiling.pop(key).wishes]


def _lower_priority(thread: threading.Thread) -> None:
    if sys.platform == "linux" and thread.native_id is not None:  # where threads have priorities of their own
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread.native_id, 19)
