"""A grammar that cannot be followed ends its own request, is nobody else's trouble, and is tried nowhere again."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from router_harness import TEXT_IDS, RouterHarness, running_router, until

from engine.engine import Engine
from engine.grammar.constraint import Constraint, GrammarMismatch
from engine.grammar.masks import MaskedRow, MaskFiller, RowMasks
from engine.request import Request
from engine.sampling import Sampled, Sampler, SampleRow
from protocol.membership import ReplicaRole
from protocol.rooms import Abort, AbortReason, FailureCode, OpenDecode, OpenGenerate, OpenPrefill, Room, RoomFailed
from protocol.sampling import FinishReason
from tests.unit.engine_driver import ends, step
from tests.unit.grammars import COMPILER, LIMITS, TOKENIZER, constrained, masks, regex
from tests.unit.rooms.bench import DecodeBench, PrefillBench, job, open_decode, open_generate, open_prefill
from tests.unit.toy_model import VOCAB, GreedySampler, toy_engine, toy_generate

__all__ = ["masks"]

ROOM = Room("a", 0)
PROMPT = [5, 6, 7, 8]
DIGITS = regex("[0-9]+")
WAIT_S = 60.0


class Stuck:
    """A matcher that does not come back before it is told to."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.may_go_on = threading.Event()

    def fill_next_token_bitmask(self, bits: torch.Tensor, place: int) -> None:
        self.entered.set()
        assert self.may_go_on.wait(WAIT_S)
        bits[place] = 0


class Dead:
    """A matcher that allows nothing."""

    def fill_next_token_bitmask(self, bits: torch.Tensor, place: int) -> None:
        bits[place] = 0


class Deaf(GreedySampler):
    """Takes no notice of masks."""

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow], masks: RowMasks | None = None) -> list[Sampled]:
        return super().sample(logits, rows)


@pytest.fixture
def hasty() -> Iterator[MaskFiller]:
    filler = MaskFiller(vocab_size=VOCAB, timeout_s=0.5)
    yield filler
    filler.close()


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    matcher = Stuck()
    yield matcher
    matcher.may_go_on.set()


def request(key: str, matcher: object | None = None, pattern: str = "[a-z]{12}") -> Request:
    """One that follows `pattern`, or what another matcher says of it."""
    made = constrained(key, regex(pattern))
    if matcher is not None:
        made.constraint._matcher = matcher  # type: ignore[union-attr]
    return made


def engine_with(masks: MaskFiller) -> Engine:
    return toy_engine(pages=200, limits=LIMITS, sampler=Sampler(), masks=masks)[0]


def test_only_the_row_that_is_stuck_is_given_up(hasty: MaskFiller, stuck: Stuck) -> None:
    engine = engine_with(hasty)
    for each in (request("before"), request("stuck", stuck), request("after"), request("last")):
        engine.add(each)
    finished, failed = ends(engine)
    assert finished == dict.fromkeys(["before", "after", "last"], FinishReason.STOP_TOKEN)
    assert "took more than 0.5 s" in failed["stuck"]
    assert hasty.counters.given_up == 1
    assert (engine.counters.grammar_failures, engine.counters.failed) == (1, 0)
    stuck.may_go_on.set()
    engine.add(request("later"))
    assert ends(engine) == ({"later": FinishReason.STOP_TOKEN}, {})


def test_two_that_are_stuck_are_given_up_one_after_the_other(hasty: MaskFiller) -> None:
    first, second = Stuck(), Stuck()
    engine = engine_with(hasty)
    for each in (request("first", first), request("sound"), request("second", second)):
        engine.add(each)
    finished, failed = ends(engine)
    assert finished == {"sound": FinishReason.STOP_TOKEN}
    assert failed.keys() == {"first", "second"}
    for matcher in (first, second):
        matcher.may_go_on.set()


def test_what_the_abandoned_thread_writes_later_changes_nothing(hasty: MaskFiller, stuck: Stuck) -> None:
    allowed = TOKENIZER.encode("a")
    slow, sound = request("slow", stuck).constraint, Constraint(COMPILER.compile(regex("a")))
    assert slow is not None
    hasty.begin([MaskedRow(0, slow), MaskedRow(1, sound)])
    abandoned = hasty._thread
    filled = hasty.finish()
    assert filled is not None
    assert abandoned is not None
    before = filled.bits.clone()
    stuck.may_go_on.set()
    abandoned.join(WAIT_S)
    assert not abandoned.is_alive(), "it ends once it comes back"
    assert torch.equal(filled.bits, before)
    assert (filled.bits[0] == -1).all(), "any token, for whatever comes is refused"
    assert [token for token in range(VOCAB) if int(filled.bits[1, token // 32]) >> token % 32 & 1] == allowed
    with pytest.raises(GrammarMismatch, match=r"took more than 0\.5 s"):
        slow.accept(allowed[0])


def test_masks_of_a_batch_that_failed_are_waited_for_and_the_slow_ones_given_up(
    hasty: MaskFiller, stuck: Stuck
) -> None:
    slow = request("slow", stuck).constraint
    sound = request("sound").constraint
    assert slow is not None
    assert sound is not None
    hasty.begin([MaskedRow(0, slow)])
    hasty.begin([MaskedRow(0, sound), MaskedRow(1, slow)])
    filled = hasty.finish()
    assert filled is not None
    assert filled.without_any() == []
    assert hasty.counters.given_up == 1, "the second batch does not ask it again"


def test_a_grammar_with_nothing_to_say_ends_its_own_request(masks: MaskFiller) -> None:
    engine = engine_with(masks)
    engine.add(request("dead", Dead()))
    engine.add(request("sound"))
    finished, failed = ends(engine)
    assert finished == {"sound": FinishReason.STOP_TOKEN}
    assert "no token of this model can follow" in failed["dead"]


def test_logits_without_a_number_are_no_grammar_s_fault(masks: MaskFiller) -> None:
    engine, model = toy_engine(pages=100, limits=LIMITS, sampler=Sampler(), masks=masks)
    forward = model.forward
    model.forward = lambda batch, pool: torch.full_like(forward(batch, pool), torch.nan)  # type: ignore[method-assign]
    engine.add(request("r"))
    (failed,) = step(engine).failed
    assert not failed.by_grammar
    assert "finite" in failed.why


# ---- through the halves of a room -----------------------------------------------------------------------------------


def following(room: Room) -> Constraint:
    return Constraint(COMPILER.compile(DIGITS))


def failures(bench: PrefillBench | DecodeBench) -> list[tuple[str, Any]]:
    """What was sent of `RoomFailed` and `Abort`."""
    told: list[tuple[str, Any]] = []
    for link, message in bench.take():
        if isinstance(message, RoomFailed):
            assert "does not allow the token" in message.detail
            told.append((link, message.code))
        elif isinstance(message, Abort):
            told.append((link, message.reason))
    return told


def test_prefill_says_that_the_grammar_is_at_fault(masks: MaskFiller) -> None:
    bench = PrefillBench(engine={"masks": masks, "sampler": Deaf()}, constrain=following)
    bench.half.handle("router", open_prefill(ROOM, job(PROMPT, grammar=DIGITS)))
    bench.run()
    assert failures(bench) == [("router", FailureCode.BAD_GRAMMAR)]
    assert bench.half.counters.failures == {FailureCode.BAD_GRAMMAR: 1}
    assert bench.engine.audit().idle


@pytest.mark.parametrize("handed_over", [True, False])
def test_decode_says_that_the_grammar_is_at_fault(masks: MaskFiller, handed_over: bool) -> None:
    prefill = PrefillBench()
    bench = DecodeBench(prefill, engine={"masks": masks, "sampler": Deaf()}, constrain=following)
    if handed_over:
        bench.half.handle("router", open_decode(ROOM, job(PROMPT, grammar=DIGITS)))
        bench.half.tick()
        prefill.half.handle("router", open_prefill(ROOM, job(PROMPT)))
        for _, message in bench.take():
            prefill.half.handle("decode", message)  # type: ignore[arg-type]
        prefill.run()
        for link, message in prefill.take():
            if link == "decode":
                bench.half.handle("prefill#1", message)  # type: ignore[arg-type]
        bench.copy_all()
    else:
        bench.half.handle("router", open_generate(ROOM, job(PROMPT, grammar=DIGITS)))
        bench.run()
    assert toy_generate(PROMPT, 1)[0] not in TOKENIZER.encode("0123456789")
    assert failures(bench) == [("router", FailureCode.BAD_GRAMMAR)]
    assert bench.half.idle
    assert bench.engine.audit().idle


# ---- at the router --------------------------------------------------------------------------------------------------


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[RouterHarness]:
    async with running_router(tmp_path) as harness:
        yield harness


async def test_before_the_first_token_it_is_a_400_that_names_the_field(router: RouterHarness) -> None:
    prefill, decode = await router.pair()
    call = router.complete(regex="[0-9]+")
    room = (await prefill.opened(OpenPrefill)).room
    await decode.opened(OpenDecode)
    prefill.fail(room, FailureCode.BAD_GRAMMAR, "it takes too long")
    await call.done()
    error = call.json["error"]
    assert (call.status, error["param"], error["code"]) == (400, "regex", "invalid_grammar")
    assert error["message"] == "regex: it takes too long"
    assert (await decode.aborted(room)).reason is AbortReason.PEER_FAILED
    await router.idle()


async def test_mid_stream_it_is_the_last_event_and_no_replica_tries_again(router: RouterHarness) -> None:
    replicas = [await router.add(name, ReplicaRole.AGGREGATED) for name in ("one", "other")]
    call = router.complete(ebnf='root ::= "a"*')
    await until(lambda: any(each.opens for each in replicas))
    (replica,) = (each for each in replicas if each.opens)
    room = (await replica.opened(OpenGenerate)).room
    replica.send(room, 0, *TEXT_IDS[:2])
    await call.shows("the")
    replica.fail(room, FailureCode.BAD_GRAMMAR, "it takes too long")
    await call.done()
    assert call.status == 200
    assert call.events[-1]["error"]["code"] == "invalid_grammar"
    assert call.events[-1]["error"]["param"] == "ebnf"
    await router.idle()
    assert sum(len(each.opens) for each in replicas) == 1
    assert router.metrics.failovers.total == 0
