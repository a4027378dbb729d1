"""A cluster's router behind a real HTTP server, and requests asked of it twice: whole and streamed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from tests.integration.worker_cluster import WorkerCluster

_WAIT_S = 300.0
_SALTS = map(str, itertools.count())


@contextlib.asynccontextmanager
async def over_a_socket(cluster: WorkerCluster) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the cluster's router on a free port of the loopback."""
    server = uvicorn.Server(uvicorn.Config(cluster.app, lifespan="off", log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server.serve(sockets=[listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, timeout=_WAIT_S, trust_env=False) as client:
            yield client
        server.should_exit = True
        await asyncio.wait_for(task, _WAIT_S)


def streamed(client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> httpx.Request:
    """A request for a stream that finds nothing in any cache."""
    return client.build_request("POST", path, json={**body, "stream": True, "cache_salt": next(_SALTS)})


@dataclass(frozen=True)
class Pair:
    """One request, answered whole and as the events of a stream."""

    whole: Any
    events: list[Any]


async def asked(client: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> Pair:
    """The same request both ways; neither finds anything in a cache."""
    answer = await client.post(path, json={**body, "cache_salt": next(_SALTS)})
    assert answer.status_code == 200, answer.text
    events = await read(client, streamed(client, path, body))
    assert events.pop()[1] == "[DONE]"
    return Pair(answer.json(), [event for _, event in events])


async def read(client: httpx.AsyncClient, request: httpx.Request, *, most: int | None = None) -> list[tuple[str, Any]]:
    """(id, data) of a stream's events, the end mark as text; after `most` of them the connection is closed."""
    events: list[tuple[str, Any]] = []
    name = ""
    stream = await client.send(request, stream=True)
    try:
        assert stream.status_code == 200, await stream.aread()
        assert stream.headers["content-type"].startswith("text/event-stream")
        async for line in stream.aiter_lines():
            field, _, value = line.partition(": ")
            if field == "id":
                name = value
            elif field == "data":
                events.append((name, value if value == "[DONE]" else json.loads(value)))
                if len(events) == most:
                    break
    finally:
        await stream.aclose()
    return events


def same(found: Any, wanted: Any, place: str = "") -> None:
    """Equal, and numbers that are not whole nearly so: two requests need not share the same steps."""
    if isinstance(wanted, float) and isinstance(found, float):
        assert math.isclose(found, wanted, abs_tol=1e-4), (place, found, wanted)
    elif isinstance(wanted, dict) and isinstance(found, dict):
        assert list(found) == list(wanted), place
        for name in wanted:
            same(found[name], wanted[name], f"{place}.{name}")
    elif isinstance(wanted, list) and isinstance(found, list):
        assert len(found) == len(wanted), (place, found, wanted)
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            same(one, other, f"{place}[{index}]")
    else:
        assert found == wanted, place
