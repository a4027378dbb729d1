"""Who is let in, who waits, who is preempted: order, fairness and room to grow."""

from __future__ import annotations

import random

from engine.config import EngineConfig
from engine.counters import EngineCounters
from engine.kv_manager import KVManager
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduled, Scheduler
from tests.unit.engine_driver import request


def _scheduler(
    *,
    pages: int = 64,
    max_running_requests: int = 8,
    chunked_prefill_size: int = 16,
    decode_headroom_tokens: int = 0,
    max_overtakes: int = 3,
) -> Scheduler:
    config = EngineConfig(
        page_size=4,
        max_total_tokens=4 * pages,
        max_running_requests=max_running_requests,
        chunked_prefill_size=chunked_prefill_size,
        decode_headroom_tokens=decode_headroom_tokens,
        max_overtakes=max_overtakes,
    )
    return Scheduler(
        config=config,
        memory=KVManager(num_pages=pages, page_size=config.page_size, enable_prefix_cache=True),
        counters=EngineCounters(),
        max_scored_tokens=1000,
    )


def _new(key: str, length: int, *, arrival: float = 0.0, retain: bool = False) -> Request:
    made = request(
        key, [random.Random(key).randrange(1000) for _ in range(length)], 100, arrival=arrival, retain=retain
    )
    made.limit = length + 100
    return made


def _compute(scheduled: list[Scheduled]) -> list[tuple[str, int]]:
    """Do as the engine does with a step's work, with token 0 for every sample."""
    for item in scheduled:
        item.request.num_computed += item.count
        if item.request.num_computed == item.request.num_tokens:
            item.request.append(0)
    return [(str(item.request.key), item.count) for item in scheduled]


def test_generation_comes_first_and_prompts_share_what_is_left() -> None:
    scheduler = _scheduler()
    scheduler.add(_new("a", 3))
    assert _compute(scheduler.schedule()) == [("a", 3)]
    scheduler.add(_new("b", 30, arrival=1))
    scheduler.add(_new("c", 5, arrival=2))
    assert _compute(scheduler.schedule()) == [("a", 1), ("b", 12)], "whole pages of the 15 tokens left"
    assert _compute(scheduler.schedule()) == [("a", 1), ("b", 12)]
    assert _compute(scheduler.schedule()) == [("a", 1), ("b", 6), ("c", 5)]
    assert _compute(scheduler.schedule()) == [("a", 1), ("b", 1), ("c", 1)]


def test_prompts_get_a_page_however_many_generate() -> None:
    scheduler = _scheduler(max_running_requests=32, chunked_prefill_size=8)
    for index in range(20):
        scheduler.add(_new(f"g{index}", 1))
    while scheduler.waiting:
        _compute(scheduler.schedule())
    scheduler.add(_new("p", 12, arrival=1))
    work = dict(_compute(scheduler.schedule()))
    assert work.pop("p") == 4
    assert set(work.values()) == {1}
    assert len(work) == 20


def test_what_does_not_fit_blocks_nobody_until_it_has_aged() -> None:
    scheduler = _scheduler(pages=10, max_overtakes=3)
    scheduler.add(_new("holds", 16))
    _compute(scheduler.schedule())
    big = _new("big", 30, arrival=1)
    scheduler.add(big)
    for index in range(5):
        scheduler.add(_new(f"small{index}", 3, arrival=2 + index))
    let_in = []
    for _ in range(4):
        let_in += [key for key, _ in _compute(scheduler.schedule()) if key.startswith("small")]
    assert set(let_in) == {"small0", "small1", "small2"}, "three overtake, the others wait behind it"
    for done in scheduler.running.copy():
        scheduler.remove(done)
        scheduler._memory.drop(done)
    assert _compute(scheduler.schedule())[0][0] == "big"
    assert big.overtaken == 0


def test_what_others_have_computed_meanwhile_can_make_a_request_fit() -> None:
    scheduler = _scheduler(pages=13, max_overtakes=9)
    stem = list(range(500, 532))
    one, two = request("one", [*stem, 1], 9, arrival=1), request("two", [*stem, 2], 9, arrival=2)
    one.limit = two.limit = 60
    scheduler.add(one)
    scheduler.add(two)
    assert _compute(scheduler.schedule()) == [("one", 16)]
    assert _compute(scheduler.schedule()) == [("one", 16)]
    assert two.status is RequestStatus.WAITING, "9 pages each, 13 in all"
    assert _compute(scheduler.schedule()) == [("one", 1)]
    scheduler._memory.publish(one)
    assert _compute(scheduler.schedule()) == [("one", 1), ("two", 1)]


def test_an_aged_request_holds_reservations_back_too() -> None:
    scheduler = _scheduler(pages=10, max_overtakes=2)
    scheduler.add(_new("holds", 16))
    _compute(scheduler.schedule())
    scheduler.add(_new("big", 30))
    _compute(scheduler.schedule())
    assert scheduler.reserve(_new("r0", 3))
    assert scheduler.reserve(_new("r1", 3))
    assert not scheduler.reserve(_new("r2", 3))


def test_nobody_is_let_in_without_room_for_all_to_grow() -> None:
    scheduler = _scheduler(pages=10, decode_headroom_tokens=8)
    scheduler.add(_new("a", 8))
    _compute(scheduler.schedule())
    scheduler.add(_new("b", 20, arrival=1))
    assert _compute(scheduler.schedule()) == [("a", 1)], "2 + 2 for a, 5 + 2 for b is more than 10"
    scheduler.add(_new("c", 12, arrival=2))
    assert _compute(scheduler.schedule()) == [("a", 1), ("c", 12)], "2 + 2 for a, 3 + 2 for c is not"


def test_those_let_in_together_count_each_other_s_growth() -> None:
    scheduler = _scheduler(pages=14, decode_headroom_tokens=8, chunked_prefill_size=64)
    for index in range(4):
        scheduler.add(_new(f"w{index}", 8, arrival=index))
    assert [key for key, _ in _compute(scheduler.schedule())] == ["w0", "w1", "w2"], "2 + 2 pages each, 14 in all"

    scheduler = _scheduler(pages=14, decode_headroom_tokens=8)
    assert [scheduler.reserve(_new(f"r{index}", 8)) for index in range(4)] == [True, True, True, False]


def test_retained_requests_do_not_grow() -> None:
    scheduler = _scheduler(pages=8, decode_headroom_tokens=8, chunked_prefill_size=64)
    for index in range(4):
        scheduler.add(_new(f"p{index}", 8, arrival=index, retain=True))
    assert len(scheduler.schedule()) == 4


def test_headroom_is_waived_for_one_alone() -> None:
    scheduler = _scheduler(pages=10, decode_headroom_tokens=64, chunked_prefill_size=64)
    scheduler.add(_new("a", 40))
    assert _compute(scheduler.schedule()) == [("a", 40)]


def test_the_youngest_is_preempted_and_keeps_its_tokens() -> None:
    scheduler = _scheduler(pages=6, chunked_prefill_size=32)
    old, young = _new("old", 8, arrival=1), _new("young", 8, arrival=2)
    scheduler.add(young)
    scheduler.add(old)
    _compute(scheduler.schedule())
    assert [each.key for each in scheduler.running] == ["old", "young"]
    while young.status is RequestStatus.RUNNING:
        _compute(scheduler.schedule())
    assert old.table.count == 4
    assert young.num_generated == 5
    assert scheduler.waiting == [young]
    assert scheduler._memory.num_cached_tokens(young.tokens.tolist(), namespace="") > 0, "its pages are kept while free"
    scheduler.remove(old)
    scheduler._memory.drop(old)
    work = _compute(scheduler.schedule())
    assert work[0][0] == "young"
    assert work[0][1] < young.num_tokens, "what is still cached is not computed again"


def test_a_retained_request_is_never_preempted() -> None:
    scheduler = _scheduler(pages=8, chunked_prefill_size=12)
    grows, retained = _new("grows", 8, arrival=1), _new("retained", 24, arrival=2, retain=True)
    scheduler.add(grows)
    scheduler.add(retained)
    _compute(scheduler.schedule())
    assert retained.table.count == 6, "pages for the whole prompt at once"
    _compute(scheduler.schedule())
    assert grows.status is RequestStatus.WAITING, "younger or not, it is the only one that can go"
    assert retained.status is RequestStatus.RUNNING
    assert retained.table.count == 6


def test_a_preempted_request_goes_back_to_its_place_by_age() -> None:
    scheduler = _scheduler(pages=4, chunked_prefill_size=32, max_running_requests=2)
    scheduler.add(_new("a", 8, arrival=1))
    scheduler.add(_new("b", 8, arrival=2))
    scheduler.add(_new("c", 8, arrival=3))
    _compute(scheduler.schedule())
    _compute(scheduler.schedule())
    assert [each.key for each in scheduler.waiting] == ["b", "c"]


def test_the_highest_priority_goes_first_and_the_lowest_gives_way() -> None:
    scheduler = _scheduler(max_running_requests=1)
    for key, priority in (("plain", 0), ("low", -1), ("high", 5), ("higher", 6)):
        made = _new(key, 4)
        made.priority = priority
        scheduler.add(made)
    assert [each.key for each in scheduler.waiting] == ["higher", "high", "plain", "low"]
    assert [item.request.key for item in scheduler.schedule()] == ["higher"]
