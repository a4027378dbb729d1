"""KV in 8 bits between prefill and decode: every request is served without recomputing, and what comes out is close."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.worker import TransferOptions
from engine.config import EngineConfig
from protocol.membership import ReplicaRole
from tests.integration.test_pd_unequal_pages import LENGTHS, generate, spec
from tests.integration.worker_cluster import ReplicaSpec, worker_cluster

pytestmark = pytest.mark.integration


def in_8_bits(role: ReplicaRole, page_size: int) -> ReplicaSpec:
    engine = EngineConfig(page_size=page_size, max_total_tokens=4800, chunked_prefill_size=64)
    return ReplicaSpec(role=role, engine=engine, transfer=TransferOptions(transport="tcp", wire_dtype="int8"))


async def test_pd_comes_close_to_one_replica(folder: Path) -> None:
    """Also between pages of unequal size."""
    async with worker_cluster(folder, [spec(ReplicaRole.AGGREGATED, 16)]) as cluster:
        alone = await generate(cluster)
    specs = [in_8_bits(ReplicaRole.PREFILL, 16), in_8_bits(ReplicaRole.DECODE, 32)]
    async with worker_cluster(folder, specs) as cluster:
        outputs = await generate(cluster)
        await cluster.assert_idle()
        counters = cluster.workers[1].state()["decode"]["counters"]
    assert counters["generating"] == 0, "nothing was recomputed"
    assert counters["fetch_failures"] == 0
    assert [tokens[0] for tokens in outputs] == [tokens[0] for tokens in alone], "prefill's KV is its own"
    assert outputs != alone, "these prompts tell 8 bits from more; KV may have moved as it is stored"
    same = [sum(one == other for one, other in zip(*pair, strict=True)) for pair in zip(outputs, alone, strict=True)]
    print(dict(zip(LENGTHS, same, strict=True)))
    assert sum(same) > len(LENGTHS) * len(alone[0]) // 2
