"""A whole cluster whose pages go through gloo: the tokens of an aggregated one, and our TCP when a group dies."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from cluster.worker import TransferOptions
from engine.config import EngineConfig
from engine.model.embedded import default_model_folder, fetch_embedded_model
from protocol.membership import ReplicaRole
from tests.integration.worker_cluster import ReplicaSpec, WorkerCluster, worker_cluster

pytestmark = pytest.mark.integration

ENGINE = EngineConfig(max_total_tokens=4096, chunked_prefill_size=64)
PROMPTS = [[13 * index + step for step in range(length)] for index, length in enumerate((5, 40, 130, 200), start=1)]


async def greedy(cluster: WorkerCluster, prompts: list[list[int]]) -> list[list[int]]:
    """All at once; the tokens of each."""
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    answers = await asyncio.gather(
        *(cluster.generate({"input_ids": prompt, "sampling_params": sampling}) for prompt in prompts)
    )
    await cluster.assert_idle()
    return [answer["output_ids"] for answer in answers]


async def ways_taken(cluster: WorkerCluster) -> set[str]:
    """The transports by which pages have come to the decode replica; nothing was computed a second time."""
    decode = cluster.workers[1]
    counters = await asyncio.wrap_future(decode._thread.call(lambda: decode._decode.counters))
    assert counters.generating == 0, "nothing was recomputed"
    return set(await asyncio.wrap_future(decode._thread.call(lambda: dict(decode._decode.traffic.by_transport))))


async def test_pd_by_gloo_equals_aggregated_also_when_the_group_is_killed() -> None:
    folder = fetch_embedded_model(default_model_folder())
    by_gloo = TransferOptions(transport="gloo")
    pd = [ReplicaSpec(role=role, engine=ENGINE, transfer=by_gloo) for role in (ReplicaRole.PREFILL, ReplicaRole.DECODE)]
    others = [prompt[::-1] for prompt in PROMPTS]
    async with worker_cluster(folder, pd) as cluster:
        outputs = await greedy(cluster, PROMPTS)
        assert await ways_taken(cluster) == {"gloo"}
        for helper in _helpers():
            os.kill(helper, signal.SIGKILL)
        outputs += await greedy(cluster, others)
        assert await ways_taken(cluster) <= {"gloo", "tcp"}
    assert not _helpers()
    async with worker_cluster(folder, [ReplicaSpec(role=ReplicaRole.AGGREGATED, engine=ENGINE)]) as cluster:
        assert outputs == await greedy(cluster, PROMPTS) + await greedy(cluster, others)


def _helpers() -> list[int]:
    """Our processes in groups."""
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    return [int(pid) for pid in children if b"transfer.dist.runner" in Path(f"/proc/{pid}/cmdline").read_bytes()]
