"""A whole cluster whose pages go through gloo: the tokens of an aggregated one, and our TCP when a group dies."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from cluster.worker import TransferOptions
from engine.config import EngineConfig
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


async def test_pd_by_gloo_equals_aggregated_also_when_the_group_is_killed(folder: Path) -> None:
    by_gloo = TransferOptions(transport="gloo")
    pd = [ReplicaSpec(role=role, engine=ENGINE, transfer=by_gloo) for role in (ReplicaRole.PREFILL, ReplicaRole.DECODE)]
    others = [prompt[::-1] for prompt in PROMPTS]
    async with worker_cluster(folder, pd) as cluster:
        async with asyncio.timeout(120):
            first_token = 100
            while (
                "gloo" not in await cluster.copies_by_transport()
            ):  # the group is there some time after the first room
                await greedy(cluster, [[first_token, *PROMPTS[-1]]])
                first_token += 1
                await asyncio.sleep(0.2)  # the helpers need the processor too
        before = await cluster.copies_by_transport()
        outputs = await greedy(cluster, PROMPTS)
        after = await cluster.copies_by_transport()
        assert after["gloo"] >= before["gloo"] + len(PROMPTS)
        assert after.get("tcp") == before.get("tcp")
        for helper in _helpers():
            os.kill(helper, signal.SIGKILL)
        outputs += await greedy(cluster, others)
        assert sum((await cluster.copies_by_transport()).values()) >= sum(after.values()) + len(others)
    assert not _helpers()
    async with worker_cluster(folder, [ReplicaSpec(role=ReplicaRole.AGGREGATED, engine=ENGINE)]) as cluster:
        assert outputs == await greedy(cluster, PROMPTS) + await greedy(cluster, others)


def _helpers() -> list[int]:
    """Our processes in groups, which others of ours have forked."""
    servers = [pid for pid in _children(os.getpid()) if b"fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return [helper for server in servers for helper in _children(server)]


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
