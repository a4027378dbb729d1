"""Any order of the engine's verbs: the books balance after each, and every token is the toy model's own."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.request import Request, RequestStatus
from tests.unit.engine_driver import request
from tests.unit.toy_model import toy_engine, toy_generate

_STEMS = [[place * 13 % 97 for place in range(60)], [place * 7 % 89 for place in range(60)]]
"""Prompts are beginnings of these, so that prefixes meet often."""


class EngineMachine(RuleBasedStateMachine):
    """One engine; a second, roomy one stands for the prefill peer whose pages are copied into reservations."""

    @initialize(
        pages=st.integers(12, 30),
        chunk=st.sampled_from([4, 8, 24]),
        places=st.integers(1, 6),
        headroom=st.sampled_from([0, 4, 16]),
        cache=st.booleans(),
    )
    def make(self, pages: int, chunk: int, places: int, headroom: int, cache: bool) -> None:
        self.engine, self.model = toy_engine(
            pages=pages,
            chunked_prefill_size=chunk,
            max_running_requests=places,
            decode_headroom_tokens=headroom,
            enable_prefix_cache=cache,
            max_overtakes=2,
        )
        self.peer, _ = toy_engine(pages=200, chunked_prefill_size=256)
        self.live: dict[int, Request] = {}
        self.prompts: dict[int, list[int]] = {}
        self.whole: dict[int, list[int]] = {}
        """All tokens each request may generate."""
        self.given: dict[int, list[int]] = {}
        """Tokens the client has, by request."""
        self.quarantined: set[int] = set()
        self.next_key = 0

    def make_request(self, stem: int, length: int, tokens: int, retain: bool, logged: int, name: str) -> Request:
        key, self.next_key = self.next_key, self.next_key + 1
        prompt = _STEMS[stem][:length]
        whole = toy_generate(prompt, tokens)
        done = whole[: min(logged, tokens - 1)]
        self.prompts[key], self.whole[key], self.given[key] = prompt, whole, list(done)
        return request(key, prompt, tokens, logged=done, retain=retain, namespace=name)

    requests = {
        "stem": st.integers(0, 1),
        "length": st.integers(1, 44),
        "tokens": st.integers(1, 40),
        "logged": st.integers(0, 3),
        "name": st.sampled_from(["", "", "x"]),
    }

    @rule(retain=st.booleans(), **requests)
    def add(self, stem: int, length: int, tokens: int, retain: bool, logged: int, name: str) -> None:
        made = self.make_request(stem, length, tokens, retain, logged, name)
        self.engine.add(made)
        self.live[made.key] = made

    @rule(**requests)
    def reserve(self, stem: int, length: int, tokens: int, logged: int, name: str) -> None:
        made = self.make_request(stem, length, tokens + 1, False, logged, name)
        before = self.engine.audit()
        if self.engine.reserve(made):
            self.live[made.key] = made
            for page in made.pages[made.num_cached // 4 :]:
                self.engine.pool.data[page] = -2.0
        else:
            after = self.engine.audit()
            assert (before.free, before.owners) == (after.free, after.owners)
            assert made.status is RequestStatus.NEW

    def in_status(self, *statuses: RequestStatus) -> list[Request]:
        return [each for each in self.live.values() if each.status in statuses]

    @precondition(lambda self: self.in_status(RequestStatus.RECEIVING))
    @rule(number=st.integers(0, 99))
    def admit(self, number: int) -> None:
        there = self.in_status(RequestStatus.RECEIVING)
        received = there[number % len(there)]
        prompt, given = self.prompts[received.key], self.given[received.key]
        peer = request("room", prompt, 99, logged=given, retain=True)
        self.peer.add(peer)
        token = None
        while token is None:
            outputs = self.peer.step().tokens
            token = outputs[0].token if outputs else None
        if len(given) + 1 == len(self.whole[received.key]):
            self.peer.release("room")
            return  # prefill would have ended it
        held = received.num_cached // 4
        for ours, theirs in zip(received.pages[held:], peer.pages[held:], strict=True):
            self.engine.pool.data[ours] = self.peer.pool.data[theirs]
        self.peer.release("room")
        self.engine.admit(received, token)
        given.append(token)

    @precondition(lambda self: len(self.in_status(RequestStatus.RECEIVING)) > 1)
    @rule(number=st.integers(0, 99))
    def unreserve(self, number: int) -> None:
        there = self.in_status(RequestStatus.RECEIVING)
        received = there[number % len(there)]
        self.engine.unreserve(received)
        del self.live[received.key]

    @precondition(lambda self: len(self.live) > 4)
    @rule(number=st.integers(0, 99), quarantine=st.booleans())
    def abort(self, number: int, quarantine: bool) -> None:
        aborted = list(self.live.values())[number % len(self.live)]
        assert self.engine.abort(aborted.key, quarantine=quarantine)
        assert aborted.status is RequestStatus.FINISHED
        del self.live[aborted.key]
        if quarantine:
            self.quarantined.add(aborted.key)

    @precondition(lambda self: self.quarantined)
    @rule(number=st.integers(0, 99))
    def drained(self, number: int) -> None:
        key = sorted(self.quarantined)[number % len(self.quarantined)]
        for page in self.engine.audit().owners.get(key, []):
            self.engine.pool.data[page] = -3.0  # the write that could still land
        self.engine.drained(key)
        self.quarantined.remove(key)

    @precondition(lambda self: self.in_status(RequestStatus.SENDING))
    @rule(number=st.integers(0, 99))
    def release(self, number: int) -> None:
        there = self.in_status(RequestStatus.SENDING)
        released = there[number % len(there)]
        self.engine.release(released.key)
        del self.live[released.key]

    @rule()
    def flush(self) -> None:
        self.engine.flush_cache()

    @rule(really=st.sampled_from([False] * 15 + [True]))
    def fail_next(self, really: bool) -> None:
        if really:
            self.model.fail_at = {self.model.passes + 1}

    @rule(count=st.integers(1, 20))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.step_once()

    def step_once(self) -> None:
        output = self.engine.step()
        for made, computed in output.progress:
            assert made.retain
            assert computed == made.num_computed or made.status is RequestStatus.FINISHED
        for made in [each.request for each in output.failed]:
            assert self.model.passes in self.model.fail_at
            del self.live[made.key]
        for token in output.tokens:
            key = token.request.key
            assert token.position == len(self.given[key])
            self.given[key].append(token.token)
            assert token.token == self.whole[key][token.position]
            if token.finish is not None:
                full = len(self.prompts[key]) + len(self.given[key]) == self.engine.max_context
                assert full or self.given[key] == self.whole[key]
                del self.live[key]
            elif token.request.retain:
                assert token.request.status is RequestStatus.SENDING

    @invariant()
    def books(self) -> None:
        report = self.engine.audit()
        assert report.balanced, report.problems
        assert set(report.owners) <= set(self.live) | self.quarantined
        assert set(self.live) == {made.key for made in self.live.values() if self.engine.get(made.key) is made}

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for key in sorted(self.quarantined):
            self.engine.drained(key)
        for made in self.in_status(RequestStatus.RECEIVING):
            self.engine.abort(made.key)
            del self.live[made.key]
        self.model.fail_at = set()
        for _ in range(3000):
            for made in self.in_status(RequestStatus.SENDING):
                self.engine.release(made.key)
                del self.live[made.key]
            if not self.engine.has_work():
                break
            self.step_once()
        assert not self.live, "with no pages held elsewhere every request comes to its end"
        report = self.engine.audit()
        assert report.idle, report


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
