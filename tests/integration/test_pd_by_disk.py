"""A whole cluster whose pages go by way of a folder: the tokens of an aggregated one, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from cluster.worker import TransferOptions
from engine.config import EngineConfig
from protocol.membership import ReplicaRole
from tests.integration.worker_cluster import ReplicaSpec, WorkerCluster, worker_cluster

pytestmark = pytest.mark.integration

ENGINE = EngineConfig(max_total_tokens=4096, chunked_prefill_size=64)
PROMPTS = [[7 * index + step for step in range(length)] for index, length in enumerate((5, 16, 40, 130, 200), start=1)]


async def greedy(cluster: WorkerCluster) -> list[list[int]]:
    """All prompts at once, twice: the second time from what the replicas have cached."""
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    outputs: list[list[int]] = []
    for _ in ("cold", "cached"):
        answers = await asyncio.gather(
            *(cluster.generate({"input_ids": prompt, "sampling_params": sampling}) for prompt in PROMPTS)
        )
        outputs += [answer["output_ids"] for answer in answers]
    await cluster.assert_idle()
    return outputs


async def test_pd_by_disk_equals_aggregated(folder: Path, tmp_path: Path) -> None:
    by_disk = TransferOptions(transport="disk", folder=tmp_path)
    pd = [ReplicaSpec(role=role, engine=ENGINE, transfer=by_disk) for role in (ReplicaRole.PREFILL, ReplicaRole.DECODE)]
    async with worker_cluster(folder, pd) as cluster:
        outputs = await greedy(cluster)
        prefill, decode = cluster.workers
        assert await asyncio.wrap_future(prefill._thread.call(lambda: prefill._prefill.counters.delivered)) == 10
        counters = await asyncio.wrap_future(decode._thread.call(lambda: decode._decode.counters))
        assert counters.generating == 0, "nothing was recomputed"
        assert len(os.listdir(tmp_path)) == 2
    assert os.listdir(tmp_path) == []
    async with worker_cluster(folder, [ReplicaSpec(role=ReplicaRole.AGGREGATED, engine=ENGINE)]) as cluster:
        assert outputs == await greedy(cluster)


def test_disk_without_checksums_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set transfer\.checksum to true"):
        TransferOptions(transport="disk", folder=tmp_path, checksum=False)
