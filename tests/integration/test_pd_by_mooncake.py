"""A whole cluster whose pages go by mooncake-transfer-engine's TCP: the tokens of an aggregated one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.worker import TransferOptions
from engine.config import EngineConfig
from protocol.membership import ReplicaRole
from tests.integration.worker_cluster import ReplicaSpec, WorkerCluster, worker_cluster
from transfer.mooncake.library import import_failure

try:
    import mooncake.engine  # noqa: F401
except ImportError as error:
    pytest.skip(import_failure(str(error)), allow_module_level=True)

pytestmark = pytest.mark.integration

ENGINE = EngineConfig(max_total_tokens=4096, chunked_prefill_size=64)
PROMPTS = [[11 * index + step for step in range(length)] for index, length in enumerate((5, 16, 40, 130, 200), start=1)]


async def greedy(cluster: WorkerCluster) -> list[list[int]]:
    """All prompts at once, then the longest alone."""
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    answers = await asyncio.gather(
        *(cluster.generate({"input_ids": prompt, "sampling_params": sampling}) for prompt in PROMPTS)
    )
    answers.append(await cluster.generate({"input_ids": PROMPTS[-1][::-1], "sampling_params": sampling}))
    await cluster.assert_idle()
    return [answer["output_ids"] for answer in answers]


async def test_pd_by_mooncake_equals_aggregated(folder: Path) -> None:
    by_mooncake = TransferOptions(transport="mooncake")
    roles = (ReplicaRole.PREFILL, ReplicaRole.DECODE)
    pd = [ReplicaSpec(role=role, engine=ENGINE, transfer=by_mooncake) for role in roles]
    async with worker_cluster(folder, pd) as cluster:
        outputs = await greedy(cluster)
        assert list(await cluster.copies_by_transport()) == ["mooncake"]
    async with worker_cluster(folder, [ReplicaSpec(role=ReplicaRole.AGGREGATED, engine=ENGINE)]) as cluster:
        assert outputs == await greedy(cluster)
