"""Pools with pages of unequal size: what comes out is what one replica alone generates, in float32."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from cluster.worker import TransferOptions
from engine.config import EngineConfig
from protocol.membership import ReplicaRole
from tests.integration.worker_cluster import ReplicaSpec, WorkerCluster, worker_cluster

pytestmark = pytest.mark.integration

LENGTHS = [1, 15, 16, 17, 31, 32, 33, 47, 48, 64, 65, 100, 129, 300]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    async def run() -> list[list[int]]:
        async with worker_cluster(folder, [spec(ReplicaRole.AGGREGATED, 16)]) as cluster:
            return await generate(cluster)

    return asyncio.run(run())


def spec(role: ReplicaRole, page_size: int, *, transport: Any = "auto") -> ReplicaSpec:
    engine = EngineConfig(page_size=page_size, max_total_tokens=4800, chunked_prefill_size=64)
    return ReplicaSpec(role=role, engine=engine, transfer=TransferOptions(transport=transport))


async def generate(cluster: WorkerCluster) -> list[list[int]]:
    """What follows each prompt, all at once."""
    draw = random.Random(5)
    text = [draw.randrange(1000, 40_000) for _ in range(max(LENGTHS))]
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    bodies = [{"input_ids": [100 + n, *text[: n - 1]], "sampling_params": sampling} for n in LENGTHS]
    answers = await asyncio.gather(*(cluster.generate(body) for body in bodies))
    return [answer["output_ids"] for answer in answers]


@pytest.mark.parametrize(("prefill", "decode", "transport"), [(16, 32, "shm"), (48, 32, "tcp")])
async def test_pd_equals_one_replica(
    folder: Path, alone: list[list[int]], prefill: int, decode: int, transport: str
) -> None:
    specs = [
        spec(ReplicaRole.PREFILL, prefill, transport=transport),
        spec(ReplicaRole.DECODE, decode, transport=transport),
    ]
    async with worker_cluster(folder, specs) as cluster:
        for _ in ("cold", "cached"):
            assert await generate(cluster) == alone
        await cluster.assert_idle()
        taker = cluster.workers[1].state()["decode"]["counters"]
        assert taker["generating"] == 0, "nothing was recomputed"
        assert taker["held_pages"] > 0, "the second round found prefixes on the decode side"
        pages = sum(-(-length // decode) for length in LENGTHS)
        assert taker["fetched_pages"] == 2 * pages - taker["held_pages"]
