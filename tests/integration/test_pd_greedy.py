"""Disaggregation changes where work happens, not what comes out: whole clusters against transformers and each other.

Real workers, links, transfers and router in one process, float32. What a chat client sees is the router's business;
here prompts go in as token ids and tokens come out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.worker import TransferOptions
from engine.config import EngineConfig
from engine.model.embedded import default_model_folder, fetch_embedded_model
from protocol.membership import ReplicaRole
from tests.integration.greedy_reference import MAX_NEW_TOKENS, Reference, differences, greedy_reference
from tests.integration.worker_cluster import ReplicaSpec, WorkerCluster, worker_cluster

pytestmark = pytest.mark.integration

LARGE = EngineConfig(max_total_tokens=16_384, chunked_prefill_size=512)
SMALL_CHUNKS = EngineConfig(max_total_tokens=16_384, chunked_prefill_size=64)
PREFILL, DECODE, AGGREGATED = ReplicaRole.PREFILL, ReplicaRole.DECODE, ReplicaRole.AGGREGATED


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetch_embedded_model(default_model_folder())


@pytest.fixture(scope="module")
def references(folder: Path) -> tuple[Reference, ...]:
    return greedy_reference(folder)


def pd(engine: EngineConfig, *, transport: Any = "auto") -> list[ReplicaSpec]:
    transfer = TransferOptions(transport=transport)
    return [ReplicaSpec(role=role, engine=engine, transfer=transfer) for role in (PREFILL, DECODE)]


async def greedy(cluster: WorkerCluster, prompts: Sequence[list[int]]) -> dict[int, list[int]]:
    """All prompts at once; the tokens of each."""
    sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS}
    answers = await asyncio.gather(
        *(cluster.generate({"input_ids": prompt, "sampling_params": sampling}) for prompt in prompts)
    )
    return {index: answer["output_ids"] for index, answer in enumerate(answers)}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_pd_equals_transformers_batched_and_from_cached_prefixes(
    folder: Path, references: tuple[Reference, ...], transport: str
) -> None:
    async with worker_cluster(folder, pd(LARGE, transport=transport)) as cluster:
        for _ in ("cold", "cached"):
            outputs = await greedy(cluster, [reference.prompt for reference in references])
            print(*differences(references, outputs), sep="\n")
        await cluster.assert_idle()
        prefill, decode = cluster.workers
        assert prefill.state()["prefill"]["counters"]["delivered"] == 2 * len(references)
        counters = decode.state()["decode"]["counters"]
        assert counters["generating"] == 0, "nothing was recomputed"
        assert counters["held_pages"] > 0, "the second round found prefixes on the decode side"


async def test_pd_alone_in_small_chunks(folder: Path, references: tuple[Reference, ...]) -> None:
    short = [reference for reference in references if len(reference.prompt) <= 600]
    async with worker_cluster(folder, pd(SMALL_CHUNKS)) as cluster:
        outputs = {}
        for index, reference in enumerate(short):
            outputs[index] = (await greedy(cluster, [reference.prompt]))[0]
        print(*differences(short, outputs), sep="\n")
        await cluster.assert_idle()


async def test_pd_equals_aggregated_when_sampling(folder: Path, references: tuple[Reference, ...]) -> None:
    """At temperature 1 with a fixed seed, filters and penalties on; batched differently on purpose."""
    short = [reference.prompt for reference in references if len(reference.prompt) <= 300]
    bodies = [
        {
            "input_ids": prompt,
            "sampling_params": {
                "temperature": 1.0,
                "sampling_seed": 1000 + index,
                "max_new_tokens": 24,
                "ignore_eos": True,
                **({"top_p": 0.9, "top_k": 50} if index % 2 else {"repetition_penalty": 1.2}),
            },
        }
        for index, prompt in enumerate(short)
    ]
    aggregated = [ReplicaSpec(role=AGGREGATED, engine=LARGE)]
    outputs = []
    for specs in (pd(SMALL_CHUNKS), aggregated):
        async with worker_cluster(folder, specs) as cluster:
            answers = await asyncio.gather(*(cluster.generate(body) for body in bodies))
            outputs.append([answer["output_ids"] for answer in answers])
            await cluster.assert_idle()
    assert all(len(tokens) == 24 for tokens in outputs[0])
    assert outputs[0] == outputs[1]
