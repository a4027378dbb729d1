"""A whole cluster without Ray, in one event loop: real workers, real links and transfers, the real router over ASGI."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette

from cluster.worker import ReplicaWorker, TransferOptions, WorkerConfig
from engine.config import EngineConfig
from protocol.membership import ReplicaRole
from router.app import build_asgi
from router.config import RouterConfig

SECRET = b"the secret of a test cluster"
MODEL_NAME = "model"


@dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """One replica of a test cluster."""

    role: ReplicaRole
    engine: EngineConfig
    transfer: TransferOptions = TransferOptions(num_threads=1)
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class WorkerCluster:
    """The running cluster: `client` speaks HTTP to its router, which is `app`."""

    workers: Sequence[ReplicaWorker]
    app: Starlette
    client: httpx.AsyncClient

    async def generate(self, body: dict[str, Any]) -> Any:
        """The answer of SGLang's /generate; anything but 200 is an assertion error with the body."""
        response = await self.client.post("/generate", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def copies_by_transport(self) -> dict[str, int]:
        """How many copies have come to the decode replica, the second; nothing was computed there a second time."""
        decode = self.workers[1]
        counters = await asyncio.wrap_future(decode._thread.call(lambda: decode._decode.counters))
        assert counters.generating == 0, "nothing was recomputed"
        book = await asyncio.wrap_future(decode._thread.call(lambda: dict(decode._decode.traffic.by_transport)))
        return {transport: traffic.copies for transport, traffic in book.items()}

    async def assert_idle(self) -> None:
        """Every replica soon has no room, and books that balance with nothing held; its `state` tells of that time."""
        for worker in self.workers:
            async with asyncio.timeout(30):
                while not (await worker.is_idle() and (await worker.audit()).idle):
                    pass  # each question waits for a pass of the engine thread
                told = worker.state()
                while worker.state() is told:
                    await worker.is_idle()


@contextlib.asynccontextmanager
async def worker_cluster(
    folder: Path, specs: Sequence[ReplicaSpec], *, num_threads: int = 1, **router: Any
) -> AsyncIterator[WorkerCluster]:
    """Start the replicas and a router that knows them, with these further settings; stop all at the end."""
    workers: list[ReplicaWorker] = []
    try:
        for index, spec in enumerate(specs):
            worker = ReplicaWorker(
                WorkerConfig(
                    replica_id=f"{spec.role.value}-{index}",
                    role=spec.role,
                    model_path=folder,
                    engine=spec.engine,
                    secret=SECRET,
                    dtype=spec.dtype,
                    num_threads=num_threads,
                    transfer=spec.transfer,
                )
            )
            await worker.start()
            workers.append(worker)
        config = RouterConfig(
            model_name=MODEL_NAME, tokenizer_folder=folder, context_length=8192, secret=SECRET, **router
        )
        app = build_asgi(config)
        app.state.members.update([worker.member for worker in workers])
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://router", timeout=300) as client,
        ):
            await until_whole(client)
            yield WorkerCluster(workers=workers, app=app, client=client)
    finally:
        for worker in workers:
            await worker.stop()


async def until_whole(client: httpx.AsyncClient) -> None:
    """Wait until the router has a link to a replica of every pool."""

    async def status() -> str:
        await asyncio.sleep(0)  # an answer within the process is no pass of the event loop, which the links need
        return str((await client.get("/health")).json().get("status"))

    async with asyncio.timeout(30):
        while await status() != "ok":
            pass
