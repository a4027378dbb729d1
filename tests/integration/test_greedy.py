"""Greedy output equals transformers' `generate`, token for token, in float32 with the real model: of the engine alone,
and of disaggregated clusters, which change where work happens and not what comes out.

The clusters have real workers, links, transfers and router in one process; what a chat client sees is the router's
business, here prompts go in as token ids and tokens come out. Where transformers' own two best logits lie within 1e-4
the outputs may part; each such place is printed (`pytest -rP` shows them all).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.worker import TransferOptions
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_spec import KVPool
from engine.model.loader import LoadedModel, load_model
from engine.request import Request
from engine.sampling import Sampler
from protocol.membership import ReplicaRole
from protocol.sampling import SamplingParams
from tests.integration.greedy_reference import (
    MAX_NEW_TOKENS,
    Reference,
    at_page_edges,
    differences,
    greedy_reference,
)
from tests.integration.worker_cluster import ReplicaSpec, WorkerCluster, worker_cluster

pytestmark = pytest.mark.integration

LARGE = EngineConfig(max_total_tokens=16_384, chunked_prefill_size=512)
SMALL_CHUNKS = EngineConfig(max_total_tokens=16_384, chunked_prefill_size=64)
PREFILL, DECODE, AGGREGATED = ReplicaRole.PREFILL, ReplicaRole.DECODE, ReplicaRole.AGGREGATED
THREADS = 1


@pytest.fixture(scope="module")
def references(folder: Path) -> tuple[Reference, ...]:
    return greedy_reference(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="float32", num_threads=THREADS)


# ---- the engine alone -----------------------------------------------------------------------------------------------


def _engine(model: LoadedModel, *, pool_tokens: int = 16_384, running: int = 64, chunk: int = 512) -> Engine:
    config = EngineConfig(max_total_tokens=pool_tokens, max_running_requests=running, chunked_prefill_size=chunk)
    return Engine(
        model=model,
        pool=KVPool(spec=model.kv_spec(config.page_size), num_pages=config.num_pages),
        config=config,
        sampler=Sampler(num_threads=THREADS),
    )


def _add(engine: Engine, index: int, reference: Reference) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS)
    engine.add(Request(key=index, prompt=reference.prompt, sampling=sampling))


def _run(engine: Engine, outputs: dict[int, list[int]]) -> dict[int, int]:
    """Run to the end, adding tokens to `outputs`; returns the cached prompt tokens of each request."""
    cached: dict[int, int] = {}
    while engine.has_work():
        output = engine.step()
        assert not output.failed
        for token in output.tokens:
            key = token.request.key
            assert isinstance(key, int)
            outputs.setdefault(key, []).append(token.token)
            if token.cached_tokens is not None:
                cached[key] = token.cached_tokens
    report = engine.audit()
    assert report.idle, report
    return cached


def test_each_alone_and_in_one_piece(model: LoadedModel, references: Sequence[Reference]) -> None:
    engine = _engine(model, running=1, chunk=4096)
    outputs: dict[int, list[int]] = {}
    for index, reference in enumerate(references):
        engine.flush_cache()
        _add(engine, index, reference)
        assert set(_run(engine, outputs).values()) == {0}
    print(*differences(references, outputs), sep="\n")


def test_batched_in_chunks_and_then_from_cached_prefixes(model: LoadedModel, references: Sequence[Reference]) -> None:
    engine = _engine(model)
    for cached in (False, True):
        outputs: dict[int, list[int]] = {}
        for index, reference in enumerate(references):
            _add(engine, index, reference)
        hits = _run(engine, outputs)
        assert all(
            hits[index] == ((len(reference.prompt) - 1) // 16 * 16 if cached else 0)
            for index, reference in enumerate(references)
        )
        print(*differences(references, outputs), sep="\n")


def test_small_chunks_and_preemption(model: LoadedModel, references: Sequence[Reference]) -> None:
    short = [reference for reference in references if len(reference.prompt) <= 600]
    engine = _engine(model, pool_tokens=1024, running=24, chunk=48)
    outputs: dict[int, list[int]] = {}
    for index, reference in enumerate(short):
        _add(engine, index, reference)
    _run(engine, outputs)
    print(*differences(short, outputs), sep="\n")


# ---- whole clusters -------------------------------------------------------------------------------------------------


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
    folder: Path, references: Sequence[Reference], transport: str
) -> None:
    if transport == "tcp":
        references = at_page_edges(references)
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


async def test_pd_alone_in_small_chunks(folder: Path, references: Sequence[Reference]) -> None:
    edges = at_page_edges(references)
    async with worker_cluster(folder, pd(SMALL_CHUNKS)) as cluster:
        outputs = {}
        for index, reference in enumerate(edges):
            outputs[index] = (await greedy(cluster, [reference.prompt]))[0]
        print(*differences(edges, outputs), sep="\n")
        await cluster.assert_idle()


async def test_pd_equals_aggregated_when_sampling(folder: Path, references: Sequence[Reference]) -> None:
    """At temperature 1 with a fixed seed, filters and penalties on; batched differently on purpose."""
    prompts = [reference.prompt for reference in at_page_edges(references) if len(reference.prompt) <= 300]
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
        for index, prompt in enumerate(prompts)
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
