"""The verbs of disaggregation on one or two engines: retain and release, reserve and admit, abort and quarantine."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engine.engine import Engine
from engine.limits import RequestTooLong
from engine.request import IllegalTransition, Request, RequestStatus
from protocol.sampling import FinishReason, SamplingParams
from tests.unit.engine_driver import assert_idle, greedy, request, run, step, tokens_of
from tests.unit.toy_model import VOCAB, ToyLimits, toy_engine, toy_generate


def _prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{seed}/{place}").randrange(97) for place in range(length)]


def _prefill(engine: Engine, key: str, prompt: list[int], **more: object) -> tuple[Request, int]:
    retained = request(key, prompt, 9, retain=True, **more)
    engine.add(retained)
    outputs = run(engine)[key]
    assert len(outputs) == 1
    return retained, outputs[0].token


def _deliver(source: Engine, pages: list[int], target: Engine, received: Request) -> None:
    """Copy the pages that the receiver does not hold, as the transfer layer would."""
    held = received.num_cached // target.config.page_size
    for ours, theirs in zip(received.pages[held:], pages[held:], strict=True):
        target.pool.data[ours] = source.pool.data[theirs]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 17, 50])
def test_two_engines_give_what_one_gives(length: int) -> None:
    prefill, decode = toy_engine()[0], toy_engine()[0]
    prompt = _prompt(length)
    retained, token = _prefill(prefill, "r", prompt)
    assert retained.status is RequestStatus.SENDING
    received = request("r", prompt, 9)
    assert decode.reserve(received)
    assert received.status is RequestStatus.RECEIVING
    _deliver(prefill, retained.pages, decode, received)
    decode.admit(received, token)
    prefill.release("r")
    outputs = run(decode)["r"]
    assert [token, *tokens_of(outputs)] == toy_generate(prompt, 9)
    assert [output.position for output in outputs] == list(range(1, 9))
    assert outputs[0].cached_tokens == 0
    assert_idle(prefill)
    assert_idle(decode)


def test_a_receiver_holds_its_cached_prefix_even_the_whole_prompt() -> None:
    prefill, decode = toy_engine()[0], toy_engine()[0]
    prompt = _prompt(16)
    decode.add(request("before", prompt, 2))
    run(decode)
    retained, token = _prefill(prefill, "r", prompt)
    received = request("r", prompt, 9)
    assert decode.reserve(received)
    assert received.num_cached == 16
    assert decode.audit().owners == {}
    assert len(received.pages) == len(retained.pages) == 4
    decode.admit(received, token)
    outputs = run(decode)["r"]
    assert [token, *tokens_of(outputs)] == toy_generate(prompt, 9)
    assert outputs[0].cached_tokens == 16


def test_progress_tells_what_can_be_offered_after_every_chunk() -> None:
    engine, _ = toy_engine(chunked_prefill_size=8)
    retained = request("r", _prompt(21), 9, retain=True)
    engine.add(retained)
    told = []
    while engine.has_work():
        output = step(engine)
        told += [(each.key, computed) for each, computed in output.progress]
        pages = retained.pages
        assert pages == list(range(pages[0], pages[0] + 6)), "one run for the whole prompt, from the first chunk on"
    assert told == [("r", 8), ("r", 16), ("r", 21)]
    engine.release("r")
    assert engine.num_prefix_tokens(_prompt(21)) == 20
    assert_idle(engine)


def test_a_retained_request_keeps_its_pages_until_released() -> None:
    engine, _ = toy_engine(pages=8)
    retained, _ = _prefill(engine, "r", _prompt(16))
    pages = retained.pages
    for key in ("a", "b", "c"):
        engine.add(request(key, _prompt(9, ord(key)), 5))
        run(engine)
    assert retained.pages == pages
    assert engine.flush_cache() > 0
    assert engine.audit().cached + len(engine.audit().owners.get("r", [])) == 4
    engine.release("r")
    assert retained.status is RequestStatus.FINISHED
    assert_idle(engine)


def test_a_retained_request_that_ends_at_its_first_token_is_over() -> None:
    engine, _ = toy_engine()
    retained = Request(key="r", prompt=_prompt(6), sampling=greedy(1), retain=True)
    engine.add(retained)
    assert run(engine)["r"][0].finish is FinishReason.LENGTH
    assert retained.status is RequestStatus.FINISHED
    assert engine.get("r") is None
    assert_idle(engine)


def test_equal_retained_prompts_keep_pages_of_their_own_while_read() -> None:
    engine, _ = toy_engine(chunked_prefill_size=64)
    one, two = (request(key, _prompt(16), 9, retain=True) for key in "ab")
    engine.add(one)
    engine.add(two)
    step(engine)
    assert not set(one.pages) & set(two.pages), "computed in one batch"
    pages = two.pages
    engine.release("a")
    assert two.pages == pages, "a peer may be reading them: no going over to the cache's copy"
    engine.release("b")
    assert_idle(engine)


def test_a_received_page_is_not_cached_before_it_is_admitted() -> None:
    engine, _ = toy_engine()
    received = request("r", _prompt(16), 9)
    assert engine.reserve(received)
    assert engine.num_prefix_tokens(_prompt(16)) == 0
    engine.abort("r")
    assert engine.num_prefix_tokens(_prompt(16)) == 0
    assert_idle(engine)


def test_quarantined_pages_go_to_nobody_until_drained() -> None:
    engine, _ = toy_engine(pages=8)
    received = request("r", _prompt(16), 9)
    assert engine.reserve(received)
    own = received.pages
    assert engine.abort("r", quarantine=True)
    report = engine.audit()
    assert (report.quarantined, report.free, report.owners) == (4, 4, {"r": own})
    assert not report.idle
    assert not engine.reserve(request("s", _prompt(20, 1), 9)), "5 pages wanted, 4 to be had"
    with pytest.raises(ValueError, match="already"):
        engine.add(request("r", _prompt(4), 9))
    engine.drained("r")
    assert_idle(engine)
    with pytest.raises(KeyError):
        engine.drained("r")


def test_an_engine_that_can_do_nothing_says_so() -> None:
    engine, _ = toy_engine(pages=8)
    _prefill(engine, "kept", _prompt(20))
    assert engine.reserve(request("held", _prompt(9, 1), 9))
    engine.add(request("waits", _prompt(9, 2), 3))
    assert engine.has_work()
    assert not step(engine).tokens
    assert not engine.has_work(), "stepping again could change nothing"
    assert not engine.reserve(request("refused", _prompt(9, 3), 9))
    assert not engine.has_work(), "and a refused reservation changes nothing either"
    engine.abort("held", quarantine=True)
    assert engine.has_work()
    assert not step(engine).tokens
    assert not engine.has_work()
    engine.drained("held")
    assert engine.has_work()
    assert tokens_of(run(engine)["waits"]) == toy_generate(_prompt(9, 2), 3)
    engine.release("kept")
    assert_idle(engine)


def test_quarantine_spares_shared_pages() -> None:
    engine, _ = toy_engine()
    engine.add(request("before", _prompt(16), 1))
    run(engine)
    received = request("r", [*_prompt(16), 1, 2, 3], 9)
    assert engine.reserve(received)
    assert received.num_cached == 16
    engine.abort("r", quarantine=True)
    assert engine.audit().quarantined == 1
    assert engine.num_prefix_tokens(_prompt(16)) == 16
    engine.drained("r")
    assert_idle(engine)


def test_a_reservation_can_be_revoked_and_made_again() -> None:
    engine, _ = toy_engine()
    received = request("r", _prompt(16), 9)
    assert engine.reserve(received)
    engine.unreserve(received)
    assert received.status is RequestStatus.NEW
    assert_idle(engine)
    assert engine.reserve(received)
    engine.unreserve(received)
    engine.add(received)
    assert tokens_of(run(engine)["r"]) == toy_generate(_prompt(16), 9), "a revoked room can be computed here instead"
    assert_idle(engine)


def test_a_reservation_that_does_not_fit_waits_and_one_that_never_fits_is_refused() -> None:
    engine, _ = toy_engine(pages=8)
    assert engine.reserve(request("a", _prompt(20), 9))
    waits = request("b", _prompt(20, 1), 9)
    assert not engine.reserve(waits)
    assert waits.status is RequestStatus.NEW
    assert engine.reserve(request("c", _prompt(1, 2), 2)), "a smaller one behind it fits"
    engine.abort("a")
    engine.abort("c")
    assert engine.reserve(waits)
    engine.abort("b")
    with pytest.raises(RequestTooLong, match=r"32 tokens.*at most 31"):
        engine.reserve(request("d", _prompt(32), 9))
    with pytest.raises(ValueError, match="nothing left"):
        engine.reserve(request("e", _prompt(3), 1, logged=[1]))
    assert_idle(engine)


def test_reservations_leave_the_running_batch_room_to_grow() -> None:
    engine, _ = toy_engine(pages=10, decode_headroom_tokens=8)
    engine.add(request("r", _prompt(8), 30))
    step(engine)
    assert not engine.reserve(request("s", _prompt(20, 1), 9)), "5 of 8 pages would leave 3, and both want to grow"
    assert engine.reserve(request("t", _prompt(8, 2), 9))
    engine.abort("t")
    run(engine)
    assert_idle(engine)


def test_reservations_keep_a_place_in_the_batch() -> None:
    engine, _ = toy_engine(max_running_requests=2)
    first, second = request("a", _prompt(4), 9), request("b", _prompt(4, 1), 9)
    assert engine.reserve(first)
    assert engine.reserve(second)
    assert not engine.reserve(request("c", _prompt(4, 2), 9))
    engine.add(request("d", _prompt(4, 3), 9))
    assert not engine.step().tokens, "no place is left for it"
    engine.abort("a")
    assert step(engine).tokens[0].request.key == "d"
    engine.abort("b")
    run(engine)
    assert_idle(engine)


def test_the_longest_prompt_is_reserved_though_its_first_token_ends_it() -> None:
    engine, _ = toy_engine(pages=8)
    received = request("r", _prompt(31), 9)
    assert engine.reserve(received), "prefill ends it, and says so; until then it is a room like any other"
    with pytest.raises(ValueError, match="ends it"):
        engine.admit(received, 1)
    engine.abort("r")
    assert_idle(engine)


def test_a_token_that_ends_the_sequence_is_not_admitted() -> None:
    engine, _ = toy_engine(limits=ToyLimits(eos_token_ids=(7,)))
    received = request("r", _prompt(6), 9)
    assert engine.reserve(received)
    with pytest.raises(ValueError, match="token 7, which ends it"):
        engine.admit(received, 7)
    assert engine.abort("r")
    with pytest.raises(ValueError, match="only a RECEIVING one"):
        engine.admit(received, 1)
    assert_idle(engine)


@pytest.mark.parametrize("steps", range(12))
def test_an_abort_at_any_point_gives_every_page_back(steps: int) -> None:
    engine, _ = toy_engine(chunked_prefill_size=8)
    keys = {"plain": False, "retained": True}
    for key, retain in keys.items():
        engine.add(request(key, _prompt(21, len(key)), 5, retain=retain))
    for _ in range(steps):
        step(engine)
    for key in keys:
        engine.abort(key)
        assert engine.audit().balanced
        assert not engine.abort(key)
    assert_idle(engine)
    assert not engine.has_work()
    engine.add(request("plain", _prompt(21, 5), 5))
    assert tokens_of(run(engine)["plain"]) == toy_generate(_prompt(21, 5), 5)


def test_only_a_sending_request_is_released() -> None:
    engine, _ = toy_engine()
    engine.add(request("r", _prompt(6), 3, retain=True))
    with pytest.raises(ValueError, match="WAITING"):
        engine.release("r")
    with pytest.raises(KeyError):
        engine.release("nobody")
    engine.abort("r")


def test_illegal_moves_are_refused() -> None:
    waiting = request("r", [1], 1)
    with pytest.raises(IllegalTransition, match="NEW to SENDING"):
        waiting.move_to(RequestStatus.SENDING)
    waiting.move_to(RequestStatus.WAITING)
    waiting.move_to(RequestStatus.FINISHED)
    for status in RequestStatus:
        with pytest.raises(IllegalTransition):
            waiting.move_to(status)


@pytest.mark.parametrize("sampling", [{}, {"logit_bias": {VOCAB: 1.0}}, {"stop_token_ids": (VOCAB,)}])
def test_what_the_vocabulary_does_not_have_is_refused_before_it_can_hurt_a_batch(sampling: dict[str, Any]) -> None:
    engine, _ = toy_engine()
    prompt = [1, 2, 3] if sampling else [1, VOCAB, 3]
    with pytest.raises(ValueError, match=f"{VOCAB}, but this model's vocabulary has {VOCAB} tokens"):
        engine.add(Request(key="wild", prompt=prompt, sampling=SamplingParams(max_tokens=4, **sampling)))
    assert not engine.has_work()
    assert engine.audit().idle
