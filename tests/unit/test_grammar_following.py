"""When a matcher hears of a token: with the next mask, on the thread that fills it, and once."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch
import xgrammar

from engine.engine import Engine
from engine.grammar.constraint import Constraint, GrammarMismatch
from engine.grammar.masks import MaskFiller
from engine.request import Request
from engine.sampling import Sampler
from protocol.sampling import FinishReason, Grammar
from tests.unit.engine_driver import assert_idle, ends, run, step, tokens_of
from tests.unit.grammars import COMPILER, END, LIMITS, RECORD, TOKENIZER, constrained, masks, regex
from tests.unit.toy_model import VOCAB, toy_engine

__all__ = ["masks"]

LETTERS = regex("[a-z]{12}")
FILLING = "grammar-masks"
WAIT_S = 60.0


class Heard:
    """A matcher that knows what it was told, and by which thread; from its `refused`-th token on it takes none."""

    def __init__(self, grammar: Grammar, *, refused: int = 1000) -> None:
        self._matcher = xgrammar.GrammarMatcher(COMPILER.compile(grammar).handle)
        self._refused = refused
        self.tokens: list[int] = []
        self.threads: list[str] = []

    def accept_token(self, token: int) -> bool:
        self.tokens.append(token)
        self.threads.append(threading.current_thread().name)
        return len(self.tokens) < self._refused and bool(self._matcher.accept_token(token))

    def fill_next_token_bitmask(self, bits: torch.Tensor, place: int) -> None:
        self._matcher.fill_next_token_bitmask(bits, place)


class Stuck:
    """A matcher that lets any token pass, and does not come back from the first before it is told to."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def accept_token(self, token: int) -> bool:
        return self.may_go_on.wait(WAIT_S)

    def fill_next_token_bitmask(self, bits: torch.Tensor, place: int) -> None:
        bits[place] = -1


class Dead:
    """A matcher that lets nothing pass."""

    def fill_next_token_bitmask(self, bits: torch.Tensor, place: int) -> None:
        bits[place] = 0


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    matcher = Stuck()
    yield matcher
    matcher.may_go_on.set()


def engine_with(masks: MaskFiller) -> Engine:
    return toy_engine(pages=200, limits=LIMITS, sampler=Sampler(), masks=masks, enable_prefix_cache=False)[0]


def following(key: object, matcher: object, grammar: Grammar = LETTERS) -> Request:
    """A request whose tokens `matcher` hears of."""
    made = constrained(key, grammar)
    made.constraint._matcher = matcher  # type: ignore[union-attr]
    return made


def test_the_filling_thread_tells_the_matcher(masks: MaskFiller) -> None:
    engine, matcher = engine_with(masks), Heard(LETTERS)
    engine.add(following("r", matcher))
    tokens = tokens_of(run(engine)["r"])
    assert matcher.tokens == tokens[:-1], "the end ends the request"
    assert set(matcher.threads) == {FILLING}


def test_a_handed_over_token_is_told_before_it_is_admitted(masks: MaskFiller) -> None:
    engine, peer = engine_with(masks), engine_with(masks)
    sent = constrained("room", LETTERS, retain=True)
    peer.add(sent)
    token = run(peer)["room"][0].token
    matcher = Heard(LETTERS)
    received = following("room", matcher)
    assert engine.reserve(received)
    engine.pool.data[received.pages] = peer.pool.data[sent.pages]
    engine.admit(received, token)
    assert (matcher.tokens, matcher.threads) == ([token], [threading.current_thread().name])
    tokens = tokens_of(run(engine)["room"])
    assert matcher.tokens == [token, *tokens[:-1]]
    assert set(matcher.threads[1:]) == {FILLING}
    peer.release("room")


def test_a_token_that_the_matcher_does_not_take_ends_its_own_request(masks: MaskFiller) -> None:
    """Its mask let it pass, so it is out; what would follow is not."""
    engine, matcher = engine_with(masks), Heard(LETTERS, refused=3)
    guilty = following("guilty", matcher)
    engine.add(guilty)
    engine.add(constrained("sound", LETTERS))
    finished, failed = ends(engine)
    assert finished == {"sound": FinishReason.STOP_TOKEN}
    assert guilty.generated == matcher.tokens
    assert len(matcher.tokens) == 3
    assert f"does not allow the token {matcher.tokens[-1]}" in failed["guilty"]


def test_a_matcher_that_is_stuck_at_a_token_is_given_up(stuck: Stuck) -> None:
    hasty = MaskFiller(vocab_size=VOCAB, timeout_s=0.5)
    engine = engine_with(hasty)
    for each in (constrained("before", LETTERS), following("stuck", stuck), constrained("after", LETTERS)):
        engine.add(each)
    finished, failed = ends(engine)
    assert finished == dict.fromkeys(["before", "after"], FinishReason.STOP_TOKEN)
    assert "took more than 0.5 s" in failed["stuck"]
    assert hasty.counters.given_up == 1
    stuck.may_go_on.set()
    hasty.close()


def test_a_batch_that_is_computed_again_tells_each_token_once(masks: MaskFiller) -> None:
    """Masks are filled again for it."""
    engine, matcher = engine_with(masks), Heard(RECORD)
    engine.add(following("r", matcher, RECORD))
    tokens = []
    for number in range(3):
        tokens.append(step(engine).tokens[0].token)
        dead = following(number, Dead(), RECORD)
        engine.add(dead)
        output = step(engine)
        assert [failed.request for failed in output.failed] == [dead]
        assert not output.tokens
    tokens += tokens_of(run(engine)["r"])
    assert matcher.tokens == tokens[:-1]
    assert_idle(engine)


def test_a_token_that_its_mask_left_out_is_refused_at_once(masks: MaskFiller) -> None:
    digit, letter = (TOKENIZER.encode(char)[0] for char in "7a")
    bits = torch.zeros((2, -(-VOCAB // 32)), dtype=torch.int32)
    constraint = Constraint(COMPILER.compile(regex("[0-9]+")))
    constraint.fill(bits, 1)
    with pytest.raises(GrammarMismatch, match=f"does not allow the token {letter}"):
        constraint.accept(letter)
    with pytest.raises(GrammarMismatch, match=f"does not allow the token {letter}"):
        constraint.accept(digit)  # given up for good


@pytest.mark.parametrize(
    "grammar",
    [
        RECORD,
        Grammar(kind="json_object"),
        Grammar(kind="ebnf", text='root ::= ("(" root ")")* "x"'),
        Grammar(kind="choice", text='["yes", "no", "a \\"third\\" way"]'),
        regex("([a-f]{1,3}|[0-9]{2,4}x)*"),
        regex("(a|ab|abc)*(ca)?"),
    ],
    ids=["record", "json", "brackets", "choice", "counts", "ambiguous"],
)
def test_masks_and_matchers_agree_on_every_token(grammar: Grammar) -> None:
    """What a mask lets pass is out before the matcher hears of it."""
    rng = random.Random(grammar.text)
    compiled = COMPILER.compile(grammar)
    for _ in range(4):
        matcher = xgrammar.GrammarMatcher(compiled.handle)
        for _ in range(25):
            bits = torch.zeros((1, -(-VOCAB // 32)), dtype=torch.int32)
            matcher.fill_next_token_bitmask(bits, 0)
            allowed = [token for token in range(VOCAB) if int(bits[0, token // 32]) >> token % 32 & 1]
            assert [token for token in range(VOCAB) if matcher.fork().accept_token(token)] == allowed
            token = rng.choice(allowed)
            if token == END:
                break
            assert matcher.accept_token(token)
