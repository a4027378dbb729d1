"""Routers whose streams a test cuts off and comes back to, each with one replica that the test plays."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from router_harness import Call, FakeReplica, RouterHarness, running_router, until

from protocol.membership import ReplicaRole

KEYS = {"keys": [{"key": "k-a", "tenant": "a"}, {"key": "k-a2", "tenant": "a"}, {"key": "k-b", "tenant": "b"}]}
ALICE, AGAIN, BOB = ({"x-api-key": key} for key in ("k-a", "k-a2", "k-b"))

Served = tuple[RouterHarness, FakeReplica]


@contextlib.asynccontextmanager
async def serving(folder: Path, **config: Any) -> AsyncIterator[Served]:
    """A router and one aggregated replica that a test plays."""
    async with running_router(folder, **config) as router:
        yield router, await router.add(f"both-{folder.name}", ReplicaRole.AGGREGATED)


async def until_shown(call: Call, events: int) -> None:
    await until(lambda: len(call.ids) >= events)


def came_back(router: RouterHarness, call: Call, *, seen: int, headers: dict[str, str] | None = None) -> Call:
    """The stream of `call` asked for again by GET, after its first `seen` events."""
    head = {"Last-Event-ID": call.ids[seen - 1]} if seen else {}
    return router.get(f"/v1/streams/{call.ids[0].partition(':')[0]}", headers=head | (headers or {}))


@contextlib.asynccontextmanager
async def two(folder: Path, keys: Path) -> AsyncIterator[tuple[Served, Served]]:
    async with (
        serving(folder / "one", api_keys_file=keys) as one,
        serving(folder / "two", api_keys_file=keys) as other,
    ):
        meet(one[0], other[0])
        yield one, other


def meet(*routers: RouterHarness) -> None:
    """What the directory does every second."""
    reports = [router.app.state.peering.report() for router in routers]
    for router in routers:
        router.app.state.peering.take(reports)
