"""The router's parts on their own: token log, stream, prefix index, load accounting, pairing."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.link import Link
from protocol.membership import Member, ReplicaRole
from protocol.rooms import Load, PeerAddress, TokenEvent
from router.config import RouterConfig
from router.metrics import Histogram, RouterMetrics
from router.pairing import PairingPolicy, Route, RouteRequest
from router.prefix_index import BLOCK_TOKENS, PrefixIndex, prefix_chain
from router.replica_view import Charge, ReplicaView
from router.token_log import ContradictionError, TokenLog
from router.token_stream import TokenStream

PROMPT = list(range(4 * BLOCK_TOKENS))


def event(position: int, token: int = -1) -> TokenEvent:
    return TokenEvent("r", 0, 0, position, token if token >= 0 else 100 + position)


class OpenLink:
    """Stands for a link that is up; nothing is sent over it here."""

    is_open = True


def view(name: str, role: ReplicaRole, *, host: str = "a", boot: int = 1, draining: bool = False) -> ReplicaView:
    address = PeerAddress(name, boot, host, 1)
    replica = ReplicaView(Member(address=address, role=role, page_size=16, max_total_tokens=4096, draining=draining))
    replica.link = cast(Link, OpenLink())
    return replica


def load(waiting_tokens: int = 0, used_pages: int = 0, *, draining: bool = False) -> Load:
    return Load(0, waiting_tokens, 0, 100 - used_pages, 0, 100, draining)


# ---- token log --------------------------------------------------------------------------------------------------


@given(st.permutations(list(range(8))), st.lists(st.integers(0, 7), max_size=8))
@settings(max_examples=200, deadline=None)
def test_log_releases_each_position_once_and_in_order(order: list[int], repeats: list[int]) -> None:
    log, released = TokenLog(), []
    for position in order + repeats:
        released += [entry.position for entry in log.offer(event(position))]
    assert released == list(range(8))
    assert log.tokens == [100 + position for position in range(8)]


def test_log_names_a_contradiction() -> None:
    log = TokenLog()
    log.offer(event(0, 7))
    with pytest.raises(ContradictionError, match="token 8 at position 0, but 7 is logged"):
        log.offer(event(0, 8))
    with pytest.raises(ContradictionError, match="position 100000"):
        log.offer(event(100_000))
    assert log.tokens == [7]


def test_log_forgets_early_tokens() -> None:
    log = TokenLog()
    log.offer(event(1))
    log.forget_early()
    assert list(log.offer(event(0))) == [event(0)]


# ---- token stream -----------------------------------------------------------------------------------------------


async def test_stream_hands_out_everything_at_once() -> None:
    stream = TokenStream(max_buffered=8, on_overflow=lambda: None)
    waiting = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    for position in range(3):
        stream.put(0, event(position))
    assert [entry.position for _, entry in await waiting] == [0, 1, 2]


async def test_stream_gives_what_it_has_before_its_error() -> None:
    stream = TokenStream(max_buffered=8, on_overflow=lambda: None)
    stream.put(1, event(0))
    stream.fail(RuntimeError("first"))
    stream.fail(RuntimeError("second"))
    stream.put(1, event(1))
    assert await stream.next() == [(1, event(0))]
    with pytest.raises(RuntimeError, match="first"):
        await stream.next()


async def test_stream_overflow_is_told_and_drops_all() -> None:
    def overflowed() -> None:
        stream.drop(RuntimeError("full"))

    stream = TokenStream(max_buffered=2, on_overflow=overflowed)
    for position in range(5):
        stream.put(0, event(position))
    with pytest.raises(RuntimeError, match="full"):
        await stream.next()


# ---- prefix index -----------------------------------------------------------------------------------------------


def test_chain_covers_full_blocks_and_all_before_them() -> None:
    chain = prefix_chain(PROMPT)
    assert len(chain) == 4
    assert prefix_chain([*PROMPT, 5]) == chain
    assert prefix_chain(PROMPT[: BLOCK_TOKENS - 1]) == []
    other = prefix_chain([7, *PROMPT[1:]])
    assert not set(other) & set(chain)
    assert not set(prefix_chain(PROMPT, namespace="tenant")) & set(chain)


def test_index_matches_the_longest_prefix() -> None:
    index = PrefixIndex(max_tokens=1000)
    index.record(prefix_chain(PROMPT[: 2 * BLOCK_TOKENS]))
    assert index.matched_tokens(prefix_chain(PROMPT)) == 2 * BLOCK_TOKENS
    assert index.matched_tokens(prefix_chain(PROMPT[::-1])) == 0


def test_index_forgets_the_least_recent_and_never_a_prefix_before_its_continuation() -> None:
    index = PrefixIndex(max_tokens=5 * BLOCK_TOKENS)
    old, new = prefix_chain(PROMPT), prefix_chain(PROMPT[::-1][: 2 * BLOCK_TOKENS])
    index.record(old)
    index.record(new)
    assert len(index) == 5
    assert index.matched_tokens(new) == 2 * BLOCK_TOKENS
    assert index.matched_tokens(old) == 3 * BLOCK_TOKENS
    index.record(prefix_chain(list(range(1000))))
    assert len(index) == 5


# ---- load accounting --------------------------------------------------------------------------------------------


def test_load_counts_at_dispatch_and_takes_only_others_share_from_reports() -> None:
    replica = view("p", ReplicaRole.PREFILL)
    replica.charge("mine", Charge(100, 120))
    assert (replica.prefill_tokens, replica.kv_tokens) == (100, 120)
    replica.observe(load(waiting_tokens=150, used_pages=10))  # 160 tokens in use
    assert (replica.prefill_tokens, replica.kv_tokens) == (150, 160)
    replica.charge("next", Charge(30, 30))
    assert (replica.prefill_tokens, replica.kv_tokens) == (180, 190)
    replica.prompt_computed("mine")
    assert (replica.prefill_tokens, replica.kv_tokens) == (80, 190)
    replica.release("mine")
    replica.release("next")
    replica.release("next")
    assert (replica.prefill_tokens, replica.kv_tokens) == (50, 40)
    replica.observe(load())
    assert (replica.prefill_tokens, replica.kv_tokens) == (0, 0)


def test_charging_a_room_again_replaces_the_charge() -> None:
    replica = view("p", ReplicaRole.PREFILL)
    replica.charge("mine", Charge(100, 100))
    replica.charge("mine", Charge(10, 10))
    assert replica.prefill_tokens == 10


# ---- pairing ----------------------------------------------------------------------------------------------------


def request(**fields: object) -> RouteRequest:
    return RouteRequest(num_tokens=len(PROMPT), chain=prefix_chain(PROMPT), **fields)  # type: ignore[arg-type]


def names(route: Route | None) -> tuple[str, ...]:
    assert route is not None
    return tuple(each.address.replica_id if each else "-" for each in (route.prefill, route.decode))


def test_least_loaded_pair() -> None:
    prefills = [view("p0", ReplicaRole.PREFILL), view("p1", ReplicaRole.PREFILL)]
    decodes = [view("d0", ReplicaRole.DECODE), view("d1", ReplicaRole.DECODE)]
    prefills[0].observe(load(waiting_tokens=500))
    decodes[1].observe(load(used_pages=50))
    assert names(PairingPolicy().choose(request(), prefills, decodes)) == ("p1", "d0")


def test_equal_loads_take_turns() -> None:
    prefills = [view(f"p{number}", ReplicaRole.PREFILL) for number in range(3)]
    decodes = [view("d", ReplicaRole.DECODE)]
    taken = []
    for number in range(6):
        route = PairingPolicy().choose(request(), prefills, decodes)
        assert route is not None
        assert route.prefill is not None
        route.prefill.charge(str(number), Charge(0, 0))
        taken.append(names(route)[0])
    assert sorted(taken) == ["p0", "p0", "p1", "p1", "p2", "p2"]


def test_a_cached_prefix_outweighs_a_small_queue_but_not_a_long_one() -> None:
    prefills = [view("cached", ReplicaRole.PREFILL), view("empty", ReplicaRole.PREFILL)]
    decodes = [view("d", ReplicaRole.DECODE)]
    prefills[0].prefixes.record(prefix_chain(PROMPT))
    prefills[0].observe(load(waiting_tokens=100))
    assert names(PairingPolicy().choose(request(), prefills, decodes))[0] == "cached"
    prefills[0].observe(load(waiting_tokens=200))
    assert names(PairingPolicy().choose(request(), prefills, decodes))[0] == "empty"


def test_pairs_within_a_host_come_first() -> None:
    prefills = [view("p-a", ReplicaRole.PREFILL, host="a"), view("p-b", ReplicaRole.PREFILL, host="b")]
    decodes = [view("d-b", ReplicaRole.DECODE, host="b")]
    assert names(PairingPolicy().choose(request(), prefills, decodes)) == ("p-b", "d-b")


def test_draining_dead_and_unlisted_replicas_are_never_chosen() -> None:
    draining = view("draining", ReplicaRole.PREFILL, draining=True)
    reported = view("reported", ReplicaRole.PREFILL)
    reported.observe(load(draining=True))
    unlisted = view("unlisted", ReplicaRole.PREFILL)
    unlisted.listed = False
    down = view("down", ReplicaRole.PREFILL)
    down.link = None
    gone = [draining, reported, unlisted, down]
    decode = view("d", ReplicaRole.DECODE)
    assert PairingPolicy().choose(request(), gone, []) is None
    assert names(PairingPolicy().choose(request(), gone, [decode])) == ("-", "d")


def test_a_replica_that_failed_the_request_is_the_last_resort() -> None:
    prefills = [view("p0", ReplicaRole.PREFILL), view("p1", ReplicaRole.PREFILL)]
    decode = view("d", ReplicaRole.DECODE)
    prefills[1].observe(load(waiting_tokens=10_000))
    avoid = {prefills[0].key}
    assert names(PairingPolicy().choose(request(avoid=avoid), prefills, [decode])) == ("p1", "d")
    assert names(PairingPolicy().choose(request(avoid={decode.key, *avoid}), prefills[:1], [decode])) == ("p0", "d")


def test_whole_requests_go_where_most_of_them_is() -> None:
    decodes = [view("d0", ReplicaRole.DECODE), view("d1", ReplicaRole.DECODE)]
    prefill = view("p", ReplicaRole.PREFILL)
    decodes[1].prefixes.record(prefix_chain(PROMPT))
    assert names(PairingPolicy().choose(request(whole=True), [prefill], decodes)) == ("-", "d1")
    assert names(PairingPolicy().choose(request(whole=True, prefer=decodes[0].key), [prefill], decodes)) == ("-", "d0")
    assert names(PairingPolicy().choose(request(whole=True), [prefill], [])) == ("-", "p")


def test_single_tokens_need_no_decode() -> None:
    prefill, decode = view("p", ReplicaRole.PREFILL), view("d", ReplicaRole.DECODE)
    assert names(PairingPolicy().choose(request(single_token=True), [prefill], [decode])) == ("p", "-")


# ---- configuration and metrics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_name": ""}, "model_name"),
        ({"secret": b""}, "secret"),
        ({"context_length": 0}, "context_length is 0"),
        ({"send_timeout_s": -1.0}, r"send_timeout_s is -1\.0"),
    ],
)
def test_configuration_is_checked(change: dict[str, object], words: str) -> None:
    settings = {"model_name": "m", "tokenizer_folder": "f", "context_length": 8, "secret": b"s"} | change
    with pytest.raises(ValueError, match=words):
        RouterConfig(**settings)  # type: ignore[arg-type]


def test_secret_is_not_shown() -> None:
    config = RouterConfig(model_name="m", tokenizer_folder="f", context_length=8, secret=b"hush")
    assert "hush" not in repr(config)


def test_histogram_counts_by_bounds() -> None:
    histogram = Histogram("h", "", (1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 99.0):
        histogram.observe(value)
    assert histogram.counts == [2, 1, 1]
    assert (histogram.count, histogram.sum) == (4, 102.0)


def test_every_metric_is_collected_once() -> None:
    metrics = RouterMetrics()
    metrics.add_gauge("g", "a gauge", lambda: 3)
    metrics.requests.add(label="200")
    metrics.requests.add(2, label="200")
    collected = {metric.name: metric for metric in metrics.collect()}
    assert len(collected) == len(list(metrics.collect()))
    assert metrics.requests["200"] == metrics.requests.total == 3
    assert "g" in collected
