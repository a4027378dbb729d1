"""kill -9 of a replica or a router in the middle of requests, and a replica that stops without dying.

In float32, so that a request which goes on elsewhere must end in the very text it has undisturbed. The cluster is one
for all tests: each also proves that it came through the one before.
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable

import aiohttp
import pytest
from live_cluster import LiveCluster
from streaming_client import Outcome, stream_completion

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

SETTINGS = {"model": {"path": "embedded", "dtype": "float32"}}
STREAMS = 10
MAX_TOKENS = 240
"""Enough for the moment to strike to come, however many tokens one event of a busy router carries."""
NEXT_TOKENS = 24
"""Of requests that only have to be served."""


def prompts(seed: str, length: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(1_000, 20_000), k=length + number) for number in range(STREAMS)]


async def run(
    session: aiohttp.ClientSession, url: str, requests: list[list[int]], *, max_tokens: int = MAX_TOKENS
) -> list[Outcome]:
    streams = (stream_completion(session, url, prompt, max_tokens=max_tokens) for prompt in requests)
    return await asyncio.gather(*streams)


async def run_and_hurt(
    session: aiohttp.ClientSession,
    cluster: LiveCluster,
    requests: list[list[int]],
    *,
    deployment: str,
    by: signal.Signals = signal.SIGKILL,
    when: Callable[[list[Outcome]], bool],
) -> list[Outcome]:
    """Stream all requests; signal a replica of `deployment` once, at the first event after which `when` holds."""
    outcomes = [Outcome() for _ in requests]
    hurt = False

    def watch(_: Outcome) -> None:
        nonlocal hurt
        if not hurt and when(outcomes):
            hurt = True
            cluster.signal(deployment, by)

    await asyncio.gather(
        *(
            stream_completion(session, cluster.url, prompt, max_tokens=MAX_TOKENS, on_event=watch, into=outcome)
            for prompt, outcome in zip(requests, outcomes, strict=True)
        )
    )
    assert hurt, "the moment to strike never came"
    return outcomes


def unfinished(outcomes: list[Outcome], *, begun: int, events: int = 1) -> bool:
    """So many requests have sent so many events, and none has ended."""
    return sum(each.events >= events for each in outcomes) >= begun and not any(each.finish for each in outcomes)


async def undisturbed_texts(
    session: aiohttp.ClientSession, cluster: LiveCluster, requests: list[list[int]]
) -> list[str]:
    outcomes = await run(session, cluster.url, requests)
    assert all_finished(outcomes)
    return [outcome.text for outcome in outcomes]


def all_finished(outcomes: list[Outcome], *, max_tokens: int = MAX_TOKENS) -> bool:
    return [(o.finish, o.completion_tokens, o.error, o.broken) for o in outcomes] == [
        ("length", max_tokens, None, None)
    ] * len(outcomes)


async def next_are_served(session: aiohttp.ClientSession, cluster: LiveCluster) -> bool:
    outcomes = await run(session, cluster.url, prompts("next", 20), max_tokens=NEXT_TOKENS)
    return all_finished(outcomes, max_tokens=NEXT_TOKENS)


async def test_decode_dies_while_it_streams(cluster: LiveCluster, session: aiohttp.ClientSession) -> None:
    requests = prompts("decode", 60)
    outcomes = await run_and_hurt(
        session,
        cluster,
        requests,
        deployment="Decode",
        when=lambda all_: unfinished(all_, begun=STREAMS // 2, events=5),
    )
    assert all_finished(outcomes), outcomes
    assert await next_are_served(session, cluster), "at once"
    await asyncio.to_thread(cluster.wait_whole, prefill=1, decode=1)
    assert [outcome.text for outcome in outcomes] == await undisturbed_texts(session, cluster, requests)
    await asyncio.to_thread(cluster.wait_balanced)


async def test_prefill_dies_while_it_computes(cluster: LiveCluster, session: aiohttp.ClientSession) -> None:
    requests = prompts("prefill", 300)
    outcomes = await run_and_hurt(
        session, cluster, requests, deployment="Prefill", when=lambda all_: unfinished(all_, begun=1)
    )
    assert all_finished(outcomes), outcomes
    assert await next_are_served(session, cluster), "at once"
    await asyncio.to_thread(cluster.wait_whole, prefill=1, decode=1)
    assert [outcome.text for outcome in outcomes] == await undisturbed_texts(session, cluster, requests)
    await asyncio.to_thread(cluster.wait_balanced)


async def test_decode_stops_while_it_streams(cluster: LiveCluster, session: aiohttp.ClientSession) -> None:
    """It does not die and closes no connection: its silence must be enough to go on without it."""
    requests = prompts("stopped", 60)
    outcomes = await run_and_hurt(
        session,
        cluster,
        requests,
        deployment="Decode",
        by=signal.SIGSTOP,
        when=lambda all_: unfinished(all_, begun=STREAMS // 2, events=5),
    )
    cluster.signal("Decode", signal.SIGCONT)
    assert all_finished(outcomes), outcomes
    await asyncio.to_thread(cluster.wait_whole, prefill=1, decode=1)
    assert [outcome.text for outcome in outcomes] == await undisturbed_texts(session, cluster, requests)
    await asyncio.to_thread(cluster.wait_balanced)


async def test_the_router_dies(cluster: LiveCluster, session: aiohttp.ClientSession) -> None:
    """Its clients' streams break; nothing hangs, the replicas let go of everything, and its successor serves."""
    outcomes = await run_and_hurt(
        session, cluster, prompts("router", 40), deployment="Router", when=lambda all_: unfinished(all_, begun=2)
    )
    assert all(outcome.broken or outcome.error or outcome.finish for outcome in outcomes)
    assert any(outcome.broken or outcome.error for outcome in outcomes)
    await asyncio.to_thread(cluster.wait_whole, prefill=1, decode=1)
    assert await next_are_served(session, cluster)
    await asyncio.to_thread(cluster.wait_balanced)
