"""Tenants' limits: on one router, over several that hear of each other late, and what the client is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_harness import TEXT_IDS, Call, running_router, until

from cluster.router_board import RouterBoard
from cluster.router_gossip import RouterGossip
from protocol.membership import ReplicaRole, RouterReport
from protocol.rooms import OpenGenerate, PeerAddress
from protocol.sampling import FinishReason
from router.auth_keys import NO_LIMITS, TenantLimits
from router.errors import ApiError
from router.metrics import RouterMetrics
from router.tenant_bucket import Bucket
from router.tenants import TenantBook

NOWHERE = PeerAddress("", 0, "", 0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def book(clock: Clock, limits: Callable[[str], TenantLimits], metrics: RouterMetrics | None = None) -> TenantBook:
    return TenantBook(limits, clock=clock, metrics=metrics or RouterMetrics())


def admitted(of: TenantBook, *, tokens: int = 1) -> bool:
    try:
        of.admit("t", prompt_tokens=tokens).close()
    except ApiError:
        return False
    return True


def refusal(of: TenantBook, *, tokens: int = 1) -> ApiError:
    with pytest.raises(ApiError) as caught:
        of.admit("t", prompt_tokens=tokens)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    return caught.value


# ---- one router -------------------------------------------------------------------------------------------------


def test_requests_a_minute() -> None:
    clock = Clock()
    tenants = book(clock, lambda tenant: TenantLimits(requests_per_minute=6))
    assert [admitted(tenants) for _ in range(7)] == [True] * 6 + [False]
    assert refusal(tenants).retry_after_s == 10
    clock.now = 9.0
    assert refusal(tenants).retry_after_s == 1
    clock.now = 10.0
    assert [admitted(tenants), admitted(tenants)] == [True, False]
    clock.now = 1000.0
    assert [admitted(tenants) for _ in range(7)] == [True] * 6 + [False]


def test_output_overdraws_and_is_paid_before_the_next_request() -> None:
    clock = Clock()
    tenants = book(clock, lambda tenant: TenantLimits(tokens_per_minute=60))
    ticket = tenants.admit("t", prompt_tokens=50)
    ticket.generated(40)
    assert refusal(tenants).retry_after_s == 31
    clock.now = 31.0
    assert admitted(tenants)
    assert "send less" in str(refusal(tenants, tokens=61))
    assert refusal(tenants, tokens=61).retry_after_s is None


def test_concurrent_requests() -> None:
    tenants = book(Clock(), lambda tenant: TenantLimits(max_concurrent_requests=2))
    first, second = (tenants.admit("t", prompt_tokens=1) for _ in range(2))
    assert refusal(tenants).retry_after_s == 1
    tenants.admit("another", prompt_tokens=1)
    first.close()
    first.close()
    third = tenants.admit("t", prompt_tokens=1)
    assert not admitted(tenants)
    second.close()
    third.close()
    assert tenants.report()["t"].concurrent == 0


def test_a_refused_request_costs_nothing() -> None:
    tenants = book(Clock(), lambda tenant: TenantLimits(requests_per_minute=2, tokens_per_minute=10))
    assert [admitted(tenants, tokens=tokens) for tokens in (11, 9, 5, 1)] == [False, True, False, True]
    assert tenants.report()["t"].spent == 10


def test_a_changed_limit_holds_at_once_and_what_is_spent_stays_spent() -> None:
    limits = [TenantLimits(requests_per_minute=4)]
    tenants = book(Clock(), lambda tenant: limits[-1])
    assert [admitted(tenants) for _ in range(3)] == [True] * 3
    limits.append(TenantLimits(requests_per_minute=5))
    assert [admitted(tenants) for _ in range(3)] == [True, True, False]
    limits.append(TenantLimits())
    assert admitted(tenants)
    assert tenants.headers("t") == []


def test_priorities_are_bounded() -> None:
    clock = Clock()
    tenants = book(clock, lambda tenant: TenantLimits(max_priority=3 if tenant == "urgent" else 0))
    for tenant, priority in (("urgent", 3), ("urgent", -3), ("t", 0), ("t", -(2**31))):
        tenants.admit(tenant, prompt_tokens=1, priority=priority).close()
    for tenant, priority, most in (("urgent", 4, 3), ("t", 1, 0)):
        with pytest.raises(
            ApiError, match=f"go {priority} before others, and this tenant may go {most} before them"
        ) as caught:
            tenants.admit(tenant, prompt_tokens=1, priority=priority)
        assert (caught.value.status, caught.value.param) == (403, "priority")
    tenants = book(clock, lambda tenant: NO_LIMITS)
    tenants.admit("", prompt_tokens=1, priority=2**31 - 1)


def test_headers_say_what_is_left() -> None:
    clock = Clock()
    tenants = book(clock, lambda tenant: TenantLimits(requests_per_minute=60, tokens_per_minute=600))
    tenants.admit("t", prompt_tokens=100)
    clock.now = 0.25
    assert {name.decode(): value.decode() for name, value in tenants.headers("t")} == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "0.8s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "502",
        "x-ratelimit-reset-tokens": "9.8s",
    }


def test_metrics_name_a_bounded_number_of_tenants() -> None:
    metrics = RouterMetrics()
    tenants = book(Clock(), lambda tenant: TenantLimits(), metrics)
    for number in range(300):
        tenants.admit(f"tenant-{number}", prompt_tokens=2)
    tenants.admit("", prompt_tokens=2)
    assert len(metrics.tenant_requests.values) == 201
    assert metrics.tenant_requests["(others)"] == 101
    assert metrics.tenant_tokens.total == 602


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50)), max_size=30), st.integers(1, 100))
@settings(max_examples=200, deadline=None)
def test_a_bucket_never_holds_more_than_a_minute_and_waits_are_true(
    steps: list[tuple[float, float]], limit: int
) -> None:
    now, bucket = 0.0, Bucket(limit, 0.0)
    for pause, amount in steps:
        now += pause
        assert bucket.level(now) <= limit
        wait = bucket.wait_s(min(amount, limit), now)
        assert bucket.level(now) >= min(amount, limit) or wait > 0
        now += wait
        assert bucket.level(now) == pytest.approx(max(bucket.level(now), min(amount, limit)))
        bucket.spend(amount, now)


# ---- several routers --------------------------------------------------------------------------------------------


def talk(board: RouterBoard, now: float, books: dict[str, TenantBook]) -> None:
    """What `Peering` and the directory do for each router in turn."""
    for key, each in books.items():
        reports = board.exchange(RouterReport(key, NOWHERE, each.report()), now)
        each.take_reports([report for report in reports if report.key != key])


@given(st.data(), st.integers(1, 4), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_the_stated_bound_holds_over_all_routers(data: st.DataObject, routers: int, limit: int, period_s: int) -> None:
    """No more than limit x (1 + t / 60), and what all routers but one let in between two exchanges."""
    clock, board = Clock(), RouterBoard(timeout_s=1000.0)
    limits = TenantLimits(requests_per_minute=limit)
    books = {f"router-{number}": book(clock, lambda tenant: limits) for number in range(routers)}
    talk(board, clock.now, books)
    total, most_between = 0, 0
    for _ in range(data.draw(st.integers(1, 8))):
        between = []
        for each in books.values():
            tried = data.draw(st.integers(0, 2 * limit))
            between.append(sum(admitted(each) for _ in range(tried)))
        total += sum(between)
        most_between = max(most_between, sum(between) - min(between))
        assert total <= limit * (1 + clock.now / 60) + most_between + 1e-6
        clock.now += period_s
        for _ in range(2):  # the first in turn hears the others' last words only in the next round
            talk(board, clock.now, books)


def test_a_tenant_that_asks_one_router_at_a_time_has_one_limit() -> None:
    clock, board = Clock(), RouterBoard(timeout_s=5.0)
    limits = TenantLimits(requests_per_minute=10, max_concurrent_requests=3)
    books = {name: book(clock, lambda tenant: limits) for name in ("one", "two")}
    for _ in range(2):
        talk(board, clock.now, books)
    for each in books.values():
        each.admit("t", prompt_tokens=1).close()
    for _ in range(2):
        talk(board, clock.now, books)
    assert sum(admitted(books["one"]) for _ in range(20)) == 8
    for _ in range(2):
        talk(board, clock.now, books)
    assert not admitted(books["two"])


def test_concurrent_requests_elsewhere_count_while_their_router_lives() -> None:
    clock, board = Clock(), RouterBoard(timeout_s=5.0)
    limits = TenantLimits(max_concurrent_requests=2)
    books = {name: book(clock, lambda tenant: limits) for name in ("one", "two")}
    for _ in range(2):
        books["one"].admit("t", prompt_tokens=1)
    talk(board, clock.now, books)
    assert not admitted(books["two"])
    del books["one"]
    clock.now = 6.0
    talk(board, clock.now, books)
    assert admitted(books["two"])


def test_a_router_that_starts_does_not_begin_a_minute_of_its_own() -> None:
    clock, board = Clock(), RouterBoard(timeout_s=5.0)
    limits = TenantLimits(requests_per_minute=10)
    books = {"one": book(clock, lambda tenant: limits)}
    assert sum(admitted(books["one"]) for _ in range(20)) == 10
    talk(board, clock.now, books)
    books["two"] = book(clock, lambda tenant: limits)
    talk(board, clock.now, books)
    assert not admitted(books["two"])
    clock.now = 6.0
    talk(board, clock.now, books)
    assert admitted(books["two"])


class Directory:
    """Fails at first."""

    def __init__(self) -> None:
        self.calls = 0
        self.board = RouterBoard(timeout_s=5.0)

    async def exchange(self, report: RouterReport) -> list[RouterReport]:
        self.calls += 1
        if self.calls <= 2:
            raise ConnectionError("the directory is away")
        return self.board.exchange(report, 0.0)


async def test_routers_go_on_telling_each_other_after_a_failure() -> None:
    directory, clock = Directory(), Clock()
    report = RouterReport("one", PeerAddress("", 0, "", 1), book(clock, lambda tenant: TenantLimits()).report())
    taken: list[RouterReport] = []
    gossip = RouterGossip(directory, report=lambda: report, take=taken.extend, period_s=0.0)
    gossip.start()
    await until(lambda: bool(taken))
    await gossip.stop()
    assert taken[0] == report
    assert directory.calls >= 3


async def test_a_router_that_does_not_listen_yet_says_nothing() -> None:
    directory, asked = Directory(), 0

    def report() -> RouterReport:
        nonlocal asked
        asked += 1
        return RouterReport("one", NOWHERE, {})

    gossip = RouterGossip(directory, report=report, take=lambda reports: None, period_s=0.0)
    gossip.start()
    await until(lambda: asked >= 3)
    await gossip.stop()
    assert directory.calls == 0


# ---- what the client is told ------------------------------------------------------------------------------------


async def test_limits_are_answered_in_the_apis_words(tmp_path: Path) -> None:
    keys = {
        "keys": [{"key": "k-a", "tenant": "a"}, {"key": "k-b", "tenant": "b"}],
        "tenants": {"a": {"max_concurrent_requests": 1, "tokens_per_minute": 250}},
    }
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(keys))
    async with running_router(tmp_path / "model", api_keys_file=path) as router:
        replica = await router.add("both", ReplicaRole.AGGREGATED)

        def ask(key: str, *, stream: bool = True) -> Call:
            body = {"prompt": [5] * 100, "max_tokens": 50, "stream": stream}
            return router.post("/v1/completions", body, headers={"x-api-key": key})

        under_way = ask("k-a")
        opened = await replica.opened(OpenGenerate)
        assert opened.job.namespace == "a"
        busy = await ask("k-a").done()
        assert (busy.status, busy.headers["retry-after"]) == (429, "1")
        assert busy.json["error"]["type"] == "rate_limit_error"
        assert busy.headers["x-ratelimit-limit-tokens"] == "250"
        other = ask("k-b")
        room = (await replica.opened(OpenGenerate)).room
        replica.send(room, 0, TEXT_IDS[0], finish=FinishReason.LENGTH)
        assert "x-ratelimit-limit-tokens" not in (await other.done()).headers

        replica.send(opened.room, 0, *TEXT_IDS[:10], finish=FinishReason.LENGTH)
        await under_way.done()
        replica.automatic = True
        whole = await ask("k-a", stream=False).done()
        assert 40 <= int(whole.headers["x-ratelimit-remaining-tokens"]) < 250  # fills by four a second
        assert router.metrics.tenant_requests.values == {"a": 2, "b": 1}
        assert router.metrics.tenant_refusals.values == {"a": 1}
        await router.idle()


async def test_nobody_overtakes_other_tenants_without_leave(tmp_path: Path) -> None:
    keys = {
        "keys": [{"key": "k-a", "tenant": "a"}, {"key": "k-b", "tenant": "b"}],
        "tenants": {"a": {"max_priority": 5}},
    }
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(keys))
    async with running_router(tmp_path / "model", api_keys_file=path) as router:
        replica = await router.add("both", ReplicaRole.AGGREGATED, automatic=True)

        async def ask(key: str, api: str, priority: int) -> Call:
            body = {"prompt": "a fox"} if api == "/v1/completions" else {"text": "a fox"}
            return await router.post(api, {**body, "priority": priority}, headers={"x-api-key": key}).done()

        # The highest goes first in one API, the lowest in the other.
        for key, api, priority, status in (
            ("k-a", "/generate", 5, 200),
            ("k-a", "/generate", 6, 403),
            ("k-a", "/v1/completions", -5, 200),
            ("k-a", "/v1/completions", -6, 403),
            ("k-b", "/generate", 1, 403),
            ("k-b", "/v1/completions", 7, 200),
        ):
            assert (await ask(key, api, priority)).status == status, (key, api, priority)
        refused = (await ask("k-b", "/v1/completions", -1)).json["error"]
        assert (refused["type"], refused["param"], refused["code"]) == (
            "permission_error",
            "priority",
            "priority_not_allowed",
        )
        assert [opened.job.priority for opened in replica.opens] == [5, 5, -7]
        await router.idle()
