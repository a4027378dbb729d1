"""Opens wait for their grammars outside of the batch, and end well or with the reason; compiling is done once."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.grammar_gate import GrammarGate, GrammarReady
from engine.grammar.cache import GrammarCache, Outcome, Wish
from engine.grammar.compiled import CompiledGrammar
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.constraint import Constraint
from engine.grammar.errors import GrammarRefused, GrammarsUnavailable
from engine.grammar.limits import GrammarLimits
from protocol.rooms import FailureCode, Job, Message, OpenGenerate, Room, RoomFailed
from protocol.sampling import Grammar, SamplingParams
from tests.unit.grammars import COMPILER, END, VOCAB, regex
from tests.unit.tiny_tokenizers import metaspace

DEADLINE_S = 60.0


class SlowCompiler(GrammarCompiler):
    """Compiles when it is told to; counts."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.began = threading.Semaphore(0)
        self.compiled = 0
        self.slow = ".*"
        """Which grammars wait for that."""

    def prepare(self) -> None:
        return

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        self.compiled += 1
        self.began.release()
        assert not re.fullmatch(self.slow, grammar.text) or self.may_go_on.wait(DEADLINE_S)
        return COMPILER.compile(grammar)


class Gate:
    """A gate, a clock, and what comes out."""

    def __init__(self, compiler: GrammarCompiler, **limits: int) -> None:
        self.now = 100.0
        self.sent: list[tuple[str, Message]] = []
        self.answers: list[GrammarReady] = []
        self.answered = threading.Semaphore(0)
        self.cache = GrammarCache(compiler, GrammarLimits(**limits))
        self.gate = GrammarGate(
            cache=self.cache,
            post=self._post,
            send=lambda link, message: self.sent.append((link, message)),
            clock=lambda: self.now,
            timeout_s=10.0,
        )

    def _post(self, ready: GrammarReady) -> None:
        self.answers.append(ready)
        self.answered.release()

    def next_answer(self) -> GrammarReady:
        assert self.answered.acquire(timeout=DEADLINE_S)
        return self.answers.pop(0)

    @property
    def failures(self) -> list[FailureCode]:
        return [message.code for _, message in self.sent if isinstance(message, RoomFailed)]


@pytest.fixture
def slow() -> Iterator[tuple[SlowCompiler, Gate]]:
    compiler = SlowCompiler()
    gate = Gate(compiler)
    yield compiler, gate
    compiler.may_go_on.set()
    gate.cache.close()


def opening(name: str, grammar: Grammar, *, ttl_ms: int = 60_000, logged: tuple[int, ...] = ()) -> OpenGenerate:
    job = Job(prompt=[1], sampling=SamplingParams(grammar=grammar), logged=list(logged))
    return OpenGenerate(Room(name, 0), job, ttl_ms)


def test_one_compilation_for_all_who_wait_and_for_all_who_come_later(slow: tuple[SlowCompiler, Gate]) -> None:
    compiler, box = slow
    digits = regex("[0-9]+")
    assert box.gate.hold("router", opening("a", digits)) is None
    assert compiler.began.acquire(timeout=DEADLINE_S)
    assert box.gate.hold("router", opening("b", digits)) is None
    box.now += 4
    compiler.may_go_on.set()
    for _ in range(2):
        given = box.gate.ready(box.next_answer())
        assert given is not None
        link, open_ = given
        assert (link, open_.ttl_ms) == ("router", 56_000), "the wait counts against the request's time"
        assert box.gate.constraint(open_.room) is not None
        assert box.gate.constraint(Room("another", 0)) is None
    at_once = box.gate.hold("router", opening("c", digits))
    assert at_once is not None
    assert compiler.compiled == 1
    assert (box.gate.num_held, box.failures) == (0, [])


def test_a_grammar_at_fault_is_refused_and_remembered() -> None:
    box = Gate(COMPILER)
    bad = regex("(a")
    assert box.gate.hold("router", opening("a", bad)) is None
    assert box.gate.ready(box.next_answer()) is None
    assert box.gate.hold("router", opening("b", bad)) is None
    assert box.failures == [FailureCode.BAD_GRAMMAR] * 2
    assert "parenthesis" in str(box.sent[0][1])
    counters = box.cache.counters
    assert (counters.compiles, counters.refused, counters.hits) == (1, 1, 1)
    assert counters.compile_seconds > 0
    box.cache.close()


def test_time_runs_out_for_the_grammar_or_for_its_turn_or_for_the_request(slow: tuple[SlowCompiler, Gate]) -> None:
    compiler, box = slow
    for name in ("a", "b"):  # both threads are busy with these
        box.gate.hold("router", opening(name, regex(name)))
        assert compiler.began.acquire(timeout=DEADLINE_S)
    box.gate.hold("router", opening("waits", regex("c")))
    box.gate.hold("router", opening("short", regex("d"), ttl_ms=3000))
    assert box.gate.next_deadline() == 103.0
    box.now = 103.0
    box.gate.tick()
    assert box.failures == [FailureCode.DEADLINE]
    box.now = 110.0
    box.gate.tick()
    assert sorted(code.value for code in box.failures[1:]) == ["bad_grammar", "bad_grammar", "overloaded"]
    assert box.gate.next_deadline() is None
    compiler.may_go_on.set()
    box.cache.close(DEADLINE_S)
    assert box.answers == [], "nobody waits for any of them any more"


def test_an_abort_and_a_lost_router_forget_what_is_held(slow: tuple[SlowCompiler, Gate]) -> None:
    _, box = slow
    box.gate.hold("one", opening("a", regex("a")))
    box.gate.hold("one", opening("b", regex("b")))
    box.gate.hold("two", opening("c", regex("c")))
    box.gate.aborted(Room("a", 0))
    assert box.gate.num_held == 2
    box.gate.link_lost("one")
    assert box.gate.num_held == 1
    assert box.sent == []
    assert box.cache.num_waiting == 1


def test_what_nobody_waits_for_any_more_is_not_compiled(slow: tuple[SlowCompiler, Gate]) -> None:
    compiler, box = slow
    for name in ("x", "y"):  # both threads are busy with these
        box.gate.hold("router", opening(name, regex(name)))
        assert compiler.began.acquire(timeout=DEADLINE_S)
    for name in ("left", "gone", "late"):
        box.gate.hold("left" if name == "left" else "router", opening(name, regex(name)))
    box.gate.hold("router", opening("wanted", regex("gone")))
    box.gate.hold("router", opening("last", regex("last")))
    box.gate.link_lost("left")
    box.gate.aborted(Room("gone", 0))
    box.gate.aborted(Room("late", 0))
    compiler.may_go_on.set()
    given = [box.gate.ready(box.next_answer()) for _ in range(4)]
    rooms = {opened[1].room.request_id for opened in given if opened is not None}
    assert rooms == {"x", "y", "wanted", "last"}
    assert compiler.compiled == 4, "another request wants what one has left"
    box.cache.close()
    assert (box.cache.counters.dropped, box.cache.num_waiting) == (3, 0)


def test_slow_grammars_do_not_keep_out_all_others(slow: tuple[SlowCompiler, Gate]) -> None:
    compiler, box = slow
    compiler.slow = "s."
    for name in ("s1", "s2"):  # both threads, and both that take their places
        box.gate.hold("router", opening(name, regex(name)))
        assert compiler.began.acquire(timeout=DEADLINE_S)
    box.now += 10
    box.gate.tick()
    assert box.failures == [FailureCode.BAD_GRAMMAR] * 2
    box.gate.hold("router", opening("quick", regex("q")))
    given = box.gate.ready(box.next_answer())
    assert given is not None
    assert given[1].room == Room("quick", 0)
    for name in ("s3", "s4"):
        box.gate.hold("router", opening(name, regex(name)))
        for _ in range(2 if name == "s3" else 1):  # the quick one is among them
            assert compiler.began.acquire(timeout=DEADLINE_S)
    box.now += 10
    box.gate.tick()
    box.gate.hold("router", opening("too many", regex("r")))
    assert box.cache.num_waiting == 1, "no more threads than twice as many"
    compiler.may_go_on.set()
    assert box.gate.ready(box.next_answer()) is not None
    if box.gate.hold("router", opening("later", regex("s1"))) is None:
        assert box.gate.ready(box.next_answer()) is not None
    assert compiler.compiled == 6, "nothing is compiled twice, however late it was"


def test_requests_that_left_make_room_for_others(slow: tuple[SlowCompiler, Gate]) -> None:
    compiler, _ = slow
    box = Gate(compiler, max_waiting=2)
    for name in "abc":
        box.gate.hold("router", opening(name, regex(name)))
        box.gate.aborted(Room(name, 0))
    assert box.failures == []
    compiler.may_go_on.set()
    box.cache.close()


def test_too_many_at_once_are_sent_away(slow: tuple[SlowCompiler, Gate]) -> None:
    compiler, _ = slow
    box = Gate(compiler, max_waiting=2)
    for name in "abc":
        box.gate.hold("router", opening(name, regex(name)))
    assert box.failures == [FailureCode.OVERLOADED]
    compiler.may_go_on.set()
    box.cache.close()


def test_a_resumed_sequence_is_replayed_and_a_wrong_one_found_out() -> None:
    box = Gate(COMPILER)
    digits = regex("[0-9]+")
    five = tuple(token for token in range(VOCAB) if COMPILER._tokenizer.bytes_of(token) == b"5")
    box.gate.hold("router", opening("warm", digits))
    assert box.gate.ready(box.next_answer()) is not None
    assert box.gate.hold("router", opening("short", digits, logged=five * 3)) is not None
    assert box.gate.hold("router", opening("long", digits, logged=five * 1000)) is None, "on a worker's thread"
    assert box.gate.ready(box.next_answer()) is not None
    assert box.gate.hold("router", opening("wrong", digits, logged=(40,))) is None
    assert box.failures == [FailureCode.BAD_GRAMMAR], "every replica would come to the same point"
    box.cache.close()


def test_what_is_least_used_goes_when_memory_is_short() -> None:
    sizes = COMPILER.compile(regex("a1")).num_bytes
    cache = GrammarCache(COMPILER, GrammarLimits(cache_bytes=2 * sizes + 1000))
    for pattern in ("a1", "a2", "a1", "a3", "a1"):
        done = threading.Semaphore(0)
        outcomes: list[Outcome] = []

        def take(outcome: Outcome, into: list[Outcome] = outcomes, done: threading.Semaphore = done) -> None:
            into.append(outcome)
            done.release()

        answer = cache.request(regex(pattern), (), take)
        if isinstance(answer, Wish):
            assert done.acquire(timeout=DEADLINE_S)
            answer = outcomes[0]
        assert isinstance(answer, Constraint)
    assert (cache.counters.compiles, cache.counters.hits) == (3, 2)
    assert cache.num_bytes <= 2 * sizes + 1000
    cache.close()


def test_models_without_bytes_or_an_end_have_no_grammars() -> None:
    with pytest.raises(GrammarsUnavailable, match="bytes"):
        GrammarCompiler(metaspace(), vocab_size=VOCAB, eos_token_ids=[END]).prepare()
    with pytest.raises(GrammarsUnavailable, match="end-of-sequence"):
        GrammarCompiler(COMPILER._tokenizer, vocab_size=VOCAB, eos_token_ids=[]).prepare()


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (regex("(?=a)b"), "Lookahead"),
        (Grammar(kind="ebnf", text="root ::= root"), "matches no text"),
        (Grammar(kind="ebnf", text='start ::= "a"'), "root"),
        (Grammar(kind="json_schema", text='{"type":"what"}'), "Unsupported type"),
        (
            Grammar(kind="structural_tag", text='{"structures":[{"begin":"<a>"}],"triggers":["<"]}'),
            "cannot be compiled",
        ),
        (Grammar(kind="structural_tag", text='{"type":"structural_tag","format":{"type":"no"}}'), "not recognized"),
    ],
)
def test_refusals_say_what(grammar: Grammar, words: str) -> None:
    with pytest.raises(GrammarRefused, match=words):
        COMPILER.compile(grammar)


def test_a_grammar_has_a_size_limit() -> None:
    small = GrammarCompiler(COMPILER._tokenizer, vocab_size=VOCAB, eos_token_ids=[END], max_bytes=1000)
    with pytest.raises(GrammarRefused, match="make it smaller"):
        small.compile(Grammar(kind="json_object"))


def test_a_grammar_that_is_slow_from_the_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fill, filled = Constraint.fill, []

    def slow(self: Constraint, bits: Any, place: int) -> None:
        fill(self, bits, place)
        filled.append(place)
        if len(filled) == 3:
            self.give_up("as made for this test")

    monkeypatch.setattr(Constraint, "fill", slow)
    with pytest.raises(GrammarRefused, match="as made for this test"):
        COMPILER.compile(regex("[a-z]+"))
