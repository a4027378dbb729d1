"""A replica that was stopped gives its memory back at once, however its pages went: no cycle of objects holds it."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.worker import ReplicaWorker, TransferOptions
from engine.config import EngineConfig
from protocol.membership import ReplicaRole
from protocol.rooms import PeerAddress
from tests.integration.worker_cluster import ReplicaSpec, worker_cluster
from transfer.choice import TransportName

pytestmark = pytest.mark.integration

ENGINE = EngineConfig(max_total_tokens=2048, chunked_prefill_size=64)
NOBODY = PeerAddress("nobody", 1, "127.0.0.1", 9)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def what_it_holds(worker: ReplicaWorker) -> dict[str, weakref.ref[object]]:
    """All that is large, or holds what is."""
    engine = worker._engine
    parts = {
        "worker": worker,
        "engine": engine,
        "model": engine._runner._model,
        "pool": engine.pool,
        "memory": worker._pages.memory,
        "page server": worker._pages._server,
        "fetcher": worker._pages.fetcher,
        "links": worker._links,
        "link server": worker._server,
        "engine thread": worker._thread,
        "grammars": worker._grammars,
    }
    return {f"{worker.config.role.value}: {name}": weakref.ref(part) for name, part in parts.items()}


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("transport", ["auto", "tcp", "disk", "gloo", "mooncake"])
async def test_nothing_of_it_is_left(
    folder: Path, tmp_path: Path, transport: TransportName, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)  # what pytest keeps of a warning holds the error, and whoever it went through
    if transport == "mooncake":
        pytest.importorskip("mooncake.engine", exc_type=ImportError)
    transfer = TransferOptions(transport=transport, folder=tmp_path if transport == "disk" else None)
    roles = (ReplicaRole.PREFILL, ReplicaRole.DECODE)
    held: dict[str, weakref.ref[object]] = {}
    async with worker_cluster(
        folder, [ReplicaSpec(role=role, engine=ENGINE, transfer=transfer) for role in roles]
    ) as cluster:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        for constrained in ({}, {"json_schema": schema}):
            sampling = {"temperature": 0, "max_new_tokens": 4, **constrained}
            await cluster.generate({"input_ids": list(range(100)), "sampling_params": sampling})
        assert await cluster.copies_by_transport()
        cluster.workers[0]._links.connect(NOBODY)  # in vain
        await cluster.assert_idle()
        for worker in cluster.workers:
            held |= what_it_holds(worker)
        del worker
    del cluster
    await asyncio.sleep(0)
    assert not [name for name, part in held.items() if part() is not None]
