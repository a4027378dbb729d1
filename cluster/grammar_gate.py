"""Opens of rooms whose output a grammar constrains wait here until the grammar is compiled.

So a room waits outside of the batch, and the halves' tables know nothing of grammars: for them the open comes when its
grammar is there. Lifecycle of a held open: `hold` -> given back by `hold` itself, where the grammar is known, or by
`ready`; refused (`RoomFailed`: the grammar is at fault, or its time is over); or forgotten (its router aborted it, or
is gone), and with it its wish for a grammar. Whoever is given an open back handles it at once, and takes its constraint
from `constraint`.

The engine thread calls everything; the compiler's threads only `post`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from engine.grammar.cache import GrammarCache, Outcome, Wish
from engine.grammar.constraint import Constraint, GrammarMismatch
from engine.grammar.errors import GrammarRefused, GrammarsUnavailable
from protocol.rooms import FailureCode, Message, OpenDecode, OpenGenerate, OpenPrefill, Room, RoomFailed
from protocol.sampling import Grammar

Opening = OpenPrefill | OpenDecode | OpenGenerate


@dataclass(frozen=True)
class GrammarReady:
    """The answer for the open held under `ticket`."""

    ticket: int
    outcome: Outcome


@dataclass(frozen=True)
class _Held:
    link_id: str
    opening: Opening
    deadline: float
    """Of the request."""
    patience: float
    """Of its grammar: when to give up waiting for it."""
    wish: Wish | None = None
    """None where the answer was there at once."""

    @property
    def grammar(self) -> Grammar:
        grammar = self.opening.job.sampling.grammar
        assert grammar is not None, "only opens with a grammar are held"
        return grammar


class GrammarGate:
    """Every open with a grammar goes through `hold`; times are readings of `clock`."""

    def __init__(
        self,
        *,
        cache: GrammarCache,
        post: Callable[[GrammarReady], None],
        send: Callable[[str, Message], None],
        clock: Callable[[], float] = time.monotonic,
        timeout_s: float = 8.0,
    ) -> None:
        """`timeout_s` is how long a grammar may take: less than a peer's `Join` waits for its room. `post` leaves an
        answer in the engine thread's inbox."""
        self._cache = cache
        self._post = post
        self._send = send
        self._clock = clock
        self._timeout_s = timeout_s
        self._held: dict[int, _Held] = {}
        self._tickets = 0
        self._given: tuple[Room, Constraint] | None = None
        """The room whose open was given back last, and its constraint."""

    @property
    def num_held(self) -> int:
        return len(self._held)

    def hold(self, link_id: str, opening: Opening) -> tuple[str, Opening] | None:
        """An open came whose job has a grammar; (link, open) if it need not wait."""
        now = self._clock()
        self._tickets += 1
        ticket = self._tickets
        held = _Held(link_id, opening, now + opening.ttl_ms / 1000, now + self._timeout_s)
        answer = self._cache.request(
            held.grammar, opening.job.logged, lambda outcome: self._post(GrammarReady(ticket, outcome))
        )
        self._held[ticket] = replace(held, wish=answer) if isinstance(answer, Wish) else held
        if isinstance(answer, Wish):
            return None
        if answer is None:
            self._fail(ticket, FailureCode.OVERLOADED, "too many requests wait for their grammars to be compiled")
            return None
        return self.ready(GrammarReady(ticket, answer))

    def ready(self, event: GrammarReady) -> tuple[str, Opening] | None:
        """A grammar is compiled, or refused: (link, open) if it is there and the open still held."""
        if event.ticket not in self._held:
            return None
        match event.outcome:
            case Constraint():
                return self._give(event.ticket, event.outcome)
            case GrammarRefused():
                self._fail(event.ticket, FailureCode.BAD_GRAMMAR, str(event.outcome))
            case GrammarMismatch():
                words = f"it cannot be followed through the output so far: {event.outcome}"
                self._fail(event.ticket, FailureCode.BAD_GRAMMAR, words)
            case GrammarsUnavailable():
                self._fail(event.ticket, FailureCode.NO_GRAMMARS, str(event.outcome))
            case _:
                self._fail(event.ticket, FailureCode.INTERNAL, f"its grammar failed: {event.outcome!r}")
        return None

    def constraint(self, room: Room) -> Constraint | None:
        """Of the room whose open was given back last; the request that is made of it owns it from then on."""
        return self._given[1] if self._given is not None and self._given[0] == room else None

    def aborted(self, room: Room) -> None:
        """The router wants the room no more."""
        for ticket, held in list(self._held.items()):
            if held.opening.room == room:
                self._let_go(ticket)

    def link_lost(self, link_id: str) -> None:
        """A router is gone, and its rooms with it."""
        for ticket, held in list(self._held.items()):
            if held.link_id == link_id:
                self._let_go(ticket)

    def tick(self) -> None:
        """Give up what has waited too long."""
        now = self._clock()
        slow = []
        for ticket, held in list(self._held.items()):
            if now >= held.deadline:
                self._fail(ticket, FailureCode.DEADLINE, "its grammar was not compiled by then")
            elif now >= held.patience and self._cache.is_compiling(held.grammar):
                words = f"it takes more than {self._timeout_s:g} s to compile; make it smaller"
                self._fail(ticket, FailureCode.BAD_GRAMMAR, words)
                slow.append(held.grammar)
            elif now >= held.patience:
                words = f"its grammar's turn to be compiled did not come within {self._timeout_s:g} s"
                self._fail(ticket, FailureCode.OVERLOADED, words)
        for grammar in slow:  # when nothing is left in the queue that is overdue
            self._cache.give_up(grammar)

    def next_deadline(self) -> float | None:
        """When `tick` must next be called."""
        return min((min(held.deadline, held.patience) for held in self._held.values()), default=None)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _give(self, ticket: int, constraint: Constraint) -> tuple[str, Opening]:
        held = self._let_go(ticket)
        ttl_ms = max(1, int(1000 * (held.deadline - self._clock())))
        opening = msgspec.structs.replace(held.opening, ttl_ms=ttl_ms)
        self._given = (opening.room, constraint)
        return held.link_id, opening

    def _let_go(self, ticket: int) -> _Held:
        """It is held no more, and its grammar not wanted if it is not there."""
        held = self._held.pop(ticket)
        if held.wish is not None:
            self._cache.withdraw(held.wish)
        return held

    def _fail(self, ticket: int, code: FailureCode, detail: str) -> None:
        held = self._let_go(ticket)
        self._send(held.link_id, RoomFailed(held.opening.room, code, detail))
