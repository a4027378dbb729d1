"""The timeline of a real request through real replicas: every phase is there, in order, and no more than there was."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trace import chrome_trace
from cluster.worker import TransferOptions
from engine.config import EngineConfig
from protocol.membership import ReplicaRole
from tests.integration.worker_cluster import ReplicaSpec, WorkerCluster, worker_cluster

pytestmark = pytest.mark.integration

PROMPT = [100 + number % 1000 for number in range(200)]
"""Four chunks, so that copies overlap with computing."""
ENGINE = EngineConfig(max_total_tokens=4096, chunked_prefill_size=64)
ROUNDING_MS = 0.01
"""Times are whole microseconds; sums of a few of them are off by a few."""
CLOCKS_MS = 1.0
"""By how much starts may be off that two parts of the cluster have measured, on one host's clock."""


async def timeline(cluster: WorkerCluster, *, max_new_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "return_timeline": True}
    told: dict[str, Any] = (await cluster.generate(body))["meta_info"]["timeline"]
    return told


def of(told: dict[str, Any], replica: str) -> dict[str, list[dict[str, Any]]]:
    """The phases of one replica by name, in order of their starts."""
    phases: dict[str, list[dict[str, Any]]] = {}
    for phase in told["phases"]:
        if phase["replica"] == replica:
            phases.setdefault(phase["name"], []).append(phase)
    return phases


def end(phase: dict[str, Any]) -> float:
    return float(phase["start_ms"] + phase["duration_ms"])


def assert_in_order(phases: Sequence[dict[str, Any]], *, slack_ms: float) -> None:
    """Each ends before the next starts."""
    for earlier, later in itertools.pairwise(phases):
        assert end(earlier) <= later["start_ms"] + slack_ms, (earlier, later)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_pd_request_tells_where_all_its_time_went(folder: Path, transport: Any) -> None:
    transfer = TransferOptions(transport=transport)
    specs = [
        ReplicaSpec(role=role, engine=ENGINE, transfer=transfer) for role in (ReplicaRole.PREFILL, ReplicaRole.DECODE)
    ]
    async with worker_cluster(folder, specs) as cluster:
        told = await timeline(cluster, max_new_tokens=4)
        await cluster.assert_idle()
        prefill, decode = of(told, "prefill-0"), of(told, "decode-1")
        (epoch,) = told["epochs"]
        assert (epoch["prefill"], epoch["decode"], epoch["outcome"]) == ("prefill-0", "decode-1", "finished")
        assert set(of(told, "router")) == {"route"}
        assert set(prefill) == {"handshake", "queue", "compute"}
        assert set(decode) == {"queue", "transfer_queue", "transfer", "admit", "first_decode", "decode"}
        assert all(phase["duration_ms"] >= 0 for phase in told["phases"])

        (route,), (compute,), (admit,) = of(told, "router")["route"], prefill["compute"], decode["admit"]
        alone = [route, *prefill["queue"], compute, admit, *decode["first_decode"], *decode["decode"]]
        assert_in_order(alone[1:3], slack_ms=ROUNDING_MS)
        assert_in_order(alone[3:], slack_ms=ROUNDING_MS)
        assert_in_order(alone, slack_ms=CLOCKS_MS)
        assert sum(phase["duration_ms"] for phase in alone) <= told["total_ms"] + ROUNDING_MS
        assert min(phase["start_ms"] for phase in told["phases"]) >= -CLOCKS_MS
        assert max(map(end, told["phases"])) <= told["total_ms"] + CLOCKS_MS

        copies = decode["transfer"]
        assert len(copies) == len(decode["transfer_queue"])
        for queued, copy in zip(decode["transfer_queue"], copies, strict=True):
            assert (copy["transport"], copy["peer"], "error" in copy) == (transport, "prefill-0", False)
            assert (queued["transport"], queued["peer"]) == (transport, "prefill-0")
            assert end(copy) <= admit["start_ms"] + ROUNDING_MS
        counters = cluster.workers[1]._decode.counters  # idle; what it reports is half a second old
        assert sum(copy["bytes"] for copy in copies) == counters.fetched_bytes > 0
        assert len(chrome_trace({"request": told})["traceEvents"]) > len(told["phases"])

        told = await timeline(cluster, max_new_tokens=1)
        assert (told["epochs"][0]["prefill"], told["epochs"][0]["decode"]) == ("prefill-0", None)
        assert set(of(told, "prefill-0")) == {"queue", "compute"}
        await cluster.assert_idle()
