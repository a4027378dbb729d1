"""When a replica says that only a new process helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.worker import WorkerUnhealthy
from engine.config import EngineConfig
from protocol.membership import ReplicaRole
from tests.integration.worker_cluster import ReplicaSpec, worker_cluster

pytestmark = pytest.mark.integration

ENGINE = EngineConfig(max_total_tokens=1024)


async def test_a_replica_that_gives_no_pages_any_more_is_unhealthy(folder: Path) -> None:
    roles = (ReplicaRole.PREFILL, ReplicaRole.DECODE)
    async with worker_cluster(folder, [ReplicaSpec(role=role, engine=ENGINE) for role in roles]) as cluster:
        for worker in cluster.workers:
            worker.check(hang_timeout_s=100)
        prefill, decode = cluster.workers
        prefill._pages._server.close()
        with pytest.raises(WorkerUnhealthy, match="moves pages"):
            prefill.check(hang_timeout_s=100)
        decode.check(hang_timeout_s=100)
