"""Who is computed in the next step, and who gets pages.

Every step takes one token of each running sequence that generates, then gives what is left of the step's token budget
to prompts, those of the highest priority first and the oldest of these: those begun, then waiting ones that can be let
in. Whoever is let in gets pages for all of its known tokens at once, in a run where possible, so only generation asks
for more later. "Old" and "young" are meant in this order.

Fairness: a waiting request that does not fit never stops a later one that does, until `max_overtakes` later ones have
been let in; then everybody waits for it. Pages: nobody is let in unless the running ones can still grow by
`decode_headroom_tokens` each. When a page is missing all the same, the youngest running request is preempted: it goes
back to waiting with its generated tokens and is computed again. Requests with `retain` never grow and are never
preempted, since a peer may be reading their pages.

No deadlock: with nothing running or reserved, headroom is waived, so the oldest waiting request needs only what the
engine's context limit promises to exist.
"""

from __future__ import annotations

from bisect import insort

import msgspec

from engine.config import EngineConfig
from engine.counters import EngineCounters
from engine.kv_manager import KVManager
from engine.radix_cache import Match
from engine.request import Request, RequestStatus


class Scheduled(msgspec.Struct, frozen=True):
    """`count` tokens of `request` are computed in this step, from `request.num_computed` on."""

    request: Request
    count: int
    scored: int = 0
    """Prompt tokens that are scored by the way."""

    @property
    def finishes(self) -> bool:
        """Whether all of the request's tokens are computed then, so that the next one can be sampled."""
        return self.request.num_computed + self.count == self.request.num_tokens


class Scheduler:
    """The waiting, reserved and running requests of one engine. Deterministic; reads no clock."""

    def __init__(
        self, *, config: EngineConfig, memory: KVManager, counters: EngineCounters, max_scored_tokens: int
    ) -> None:
        """A step scores at most `max_scored_tokens`, or those of a page: each is a row of logits."""
        self.waiting: list[Request] = []
        """Oldest first."""
        self.running: list[Request] = []
        """Oldest first; status RUNNING."""
        self.reserved: list[Request] = []
        """Status RECEIVING; each has a place in the batch kept for it."""
        self._config = config
        self._memory = memory
        self._counters = counters
        self._max_scored = max(max_scored_tokens, config.page_size)
        self._may_score = 0
        """Tokens that this step can still score."""
        self._growth_of_others: int | None = None
        """`_headroom_of_others`, kept for a row of reservations; None when it may have changed."""

    def add(self, request: Request) -> None:
        """NEW or RUNNING -> WAITING, at its place by age."""
        request.move_to(RequestStatus.WAITING)
        insort(self.waiting, request, key=_age)

    def reserve(self, request: Request) -> bool:
        """NEW -> RECEIVING with pages for all of its tokens; False, with nothing changed, when it must wait.

        All pages may be shared ones: the peer's token is what comes next, so no logits of the prompt are needed.
        """
        if not self._has_place() or any(map(self._comes_before_rooms, self.waiting)):
            return False
        if self._growth_of_others is None:
            self._growth_of_others = self._headroom_of_others()
        match = self._find_room(request, self._growth_of_others, max_tokens=request.num_tokens)
        if match is None:
            return False
        self._attach(request, match)
        request.move_to(RequestStatus.RECEIVING)
        self.reserved.append(request)
        for other in self.waiting:
            other.overtaken += 1
        self._growth_of_others = None
        return True

    def unreserve(self, request: Request) -> None:
        """RECEIVING -> NEW, pages given back."""
        request.move_to(RequestStatus.NEW)
        self.reserved.remove(request)
        self._memory.drop(request)
        self._growth_of_others = None

    def admit(self, request: Request) -> None:
        """RECEIVING -> RUNNING: the KV of all of its tokens is in its pages."""
        request.move_to(RequestStatus.RUNNING)
        self.reserved.remove(request)
        insort(self.running, request, key=_age)
        request.num_computed = request.num_tokens
        self._memory.publish(request)
        self._growth_of_others = None

    def remove(self, request: Request) -> None:
        """Take a request out of whichever line it stands in; its pages and status are the caller's affair."""
        lines = {
            RequestStatus.WAITING: self.waiting,
            RequestStatus.RUNNING: self.running,
            RequestStatus.RECEIVING: self.reserved,
        }
        if request.status in lines:
            lines[request.status].remove(request)
        self._growth_of_others = None

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of prompts that are not computed yet, and of those that are to be computed again."""
        uncomputed = (request.num_tokens - request.num_computed for request in self.running)
        return sum(request.num_tokens for request in self.waiting) + sum(count for count in uncomputed if count > 1)

    def schedule(self) -> list[Scheduled]:
        """The next step's work; every request in it has pages for what it computes. Empty when nothing can go on."""
        self._growth_of_others = None
        self._may_score = self._max_scored
        scheduled = self._generating()
        left = max(self._config.chunked_prefill_size - len(scheduled), self._config.page_size)
        for request in self.running:
            remaining = request.num_tokens - request.num_computed
            if remaining > 1:
                left -= self._take_chunk(request, remaining, left, scheduled)
        self._let_in(left, scheduled)
        return scheduled

    def _generating(self) -> list[Scheduled]:
        """One token of each running request that has just one to compute, preempting where pages are missing."""
        scheduled: list[Scheduled] = []
        index = 0
        while index < len(self.running):
            request = self.running[index]
            if request.num_tokens - request.num_computed == 1:
                # Victims are as young as the request or younger, so none of them is scheduled already.
                while not self._memory.grow(request) and self._preempt_youngest() is not request:
                    pass
                if request.status is not RequestStatus.RUNNING:
                    continue
                scheduled.append(Scheduled(request, 1))
            index += 1
        return scheduled

    def _preempt_youngest(self) -> Request:
        victim = next(request for request in reversed(self.running) if not request.retain)
        self.running.remove(victim)
        self._memory.release(victim)
        victim.num_preemptions += 1
        self._counters.preemptions += 1
        self.add(victim)
        return victim

    def _take_chunk(self, request: Request, remaining: int, left: int, scheduled: list[Scheduled]) -> int:
        """Schedule as much of a prompt as `left` allows, in whole pages unless it is the end; returns how much."""
        count = min(remaining, left)
        if request.next_score < request.num_prompt_tokens:
            count = min(count, request.next_score - 1 - request.num_computed + self._may_score)
        if count < remaining:
            page_size = self._config.page_size
            count = (request.num_computed + count) // page_size * page_size - request.num_computed
        if count > 0:
            scored = request.num_scored(count)
            scheduled.append(Scheduled(request, count, scored))
            self._may_score -= scored
            return count
        return 0

    def _let_in(self, left: int, scheduled: list[Scheduled]) -> None:
        """Give waiting requests pages and their first chunk while budget and places last."""
        if not self.waiting:
            return
        passed_over: list[Request] = []
        headroom = self._headroom_of_others()
        for request in self.waiting.copy():
            if not self._has_place() or left < min(self._config.page_size, request.num_tokens):
                break
            match = self._find_room(request, headroom, max_tokens=request.num_reusable)
            if match is None:
                if self._is_aged(request):
                    break
                passed_over.append(request)
                continue
            if any(map(self._is_aged, passed_over)):
                break
            for other in passed_over:
                other.overtaken += 1
            headroom += self._growth(request)
            self._attach(request, match)
            request.overtaken = 0
            self.waiting.remove(request)
            request.move_to(RequestStatus.RUNNING)
            insort(self.running, request, key=_age)
            left -= self._take_chunk(request, request.num_tokens - request.num_computed, left, scheduled)

    def _find_room(self, request: Request, headroom: int, *, max_tokens: int) -> Match | None:
        """Whether the request fits beside those in, who may grow by `headroom` pages; alone it needs none."""
        if self._memory.is_short(request, headroom=headroom):
            return None
        if self.running or self.reserved:
            headroom += self._growth(request)
        return self._memory.find_room(request, max_tokens=max_tokens, headroom=headroom)

    def _attach(self, request: Request, match: Match) -> None:
        self._memory.attach(request, match)
        if not request.num_preemptions:
            request.num_cached = request.num_computed
            self._counters.prompt_tokens += request.num_tokens
            self._counters.cached_tokens += request.num_cached

    def _has_place(self) -> bool:
        return len(self.running) + len(self.reserved) < self._config.max_running_requests

    def _comes_before_rooms(self, request: Request) -> bool:
        """A preempted request has a client that waits in the middle of a stream."""
        return request.num_preemptions > 0 or self._is_aged(request)

    def _is_aged(self, request: Request) -> bool:
        return request.overtaken >= self._config.max_overtakes

    def _headroom_of_others(self) -> int:
        """Pages by which those running and reserved may grow."""
        return sum(map(self._growth, self.running)) + sum(map(self._growth, self.reserved))

    def _growth(self, request: Request) -> int:
        """Pages by which a request may grow within the headroom."""
        if request.retain:
            return 0
        tokens = min(request.num_tokens + self._config.decode_headroom_tokens, request.limit)
        held = max(request.table.count, self._memory.pages_for(request.num_tokens))
        return max(0, self._memory.pages_for(tokens) - held)


def _age(request: Request) -> tuple[int, float, int]:
    return request.age_key
