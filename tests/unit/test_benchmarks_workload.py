"""What benchmarks send and how they add it up: workloads, percentiles, derived configurations, comparisons."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.configured import aggregated_settings, derive, pd_settings
from benchmarks.interference import PD, best_aggregated
from benchmarks.memory import pss_by_name, total_pss
from benchmarks.mixed_load import Phase, PhaseResult
from benchmarks.stats import percentile
from benchmarks.systems import System, parse_systems
from benchmarks.workers.job import Job, Task
from benchmarks.workload import Lengths, poisson, replay
from cluster.config import ClusterConfig


def test_poisson_is_a_function_of_its_seed() -> None:
    def make(seed: int) -> object:
        return poisson(rate=5.0, count=200, prompts=Lengths.parse("4:9"), outputs=Lengths.parse("3"), seed=seed)

    items = poisson(rate=5.0, count=200, prompts=Lengths.parse("4:9"), outputs=Lengths.parse("3"), seed=1)
    assert make(1) == items
    assert make(2) != items
    assert {len(item.prompt) for item in items} == set(range(4, 10))
    assert {item.output_tokens for item in items} == {3}
    assert items[-1].arrival_s == pytest.approx(40, rel=0.2), "200 arrivals at 5 a second"


@pytest.mark.parametrize("text", ["", "a", "0", "9:4", "1:2:3", ":"])
def test_lengths_refuse_nonsense(text: str) -> None:
    with pytest.raises(ValueError, match="length"):
        Lengths.parse(text)


def test_a_trace_keeps_its_sharing_when_scaled(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 1100, "output_length": 64, "hash_ids": [0, 1, 2]},
        {"timestamp": 500, "input_length": 1024, "output_length": 3, "hash_ids": [0, 1]},
        {"timestamp": 800, "input_length": 99999, "output_length": 3, "hash_ids": list(range(196))},
        {"timestamp": 1000, "input_length": 512, "output_length": 512, "hash_ids": [7]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second, third = replay(path, count=10, block=16, speed=2.0, max_tokens=1000, seed=0)
    assert (len(first.prompt), len(second.prompt), len(third.prompt)) == (34, 32, 16)
    assert first.prompt[:32] == second.prompt
    assert third.prompt != second.prompt[:16]
    assert [item.arrival_s for item in (first, second, third)] == [0.0, 0.25, 0.5]
    assert [item.output_tokens for item in (first, second, third)] == [2, 1, 16]


def test_percentiles_interpolate() -> None:
    assert percentile([], 50) is None
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 100) == 2.0
    assert percentile([5.0], 99) == 5.0


def test_systems_are_named_once() -> None:
    assert parse_systems(["a=http://x:1"], ["a=run --port=1"]) == [
        System(name="a", url="http://x:1", command="run --port=1")
    ]
    with pytest.raises(ValueError, match=r"\['b'\]"):
        parse_systems(["a=http://x:1"], ["b=run"])
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse_systems(["http"], [])


def test_derived_configurations_are_valid() -> None:
    base = {"applications": [{"import_path": "cluster.app:build_app", "args": {"decode": {"max_running_requests": 9}}}]}
    pd = derive(base, pd_settings(threads=2, chunk=256))
    config = ClusterConfig.model_validate(pd["applications"][0]["args"])
    assert (config.prefill.num_threads, config.decode.num_threads, config.decode.max_running_requests) == (1, 1, 9)
    aggregated = derive(base, aggregated_settings(threads=2, chunk=128))
    config = ClusterConfig.model_validate(aggregated["applications"][0]["args"])
    assert (config.mode, config.aggregated.chunked_prefill_size) == ("aggregated", 128)
    assert "mode" not in base["applications"][0]["args"], "the original stays"


def test_aggregated_mode_is_represented_by_its_best_fast_chunk_size() -> None:
    def result(itl: float, prefill: float) -> dict[Phase, PhaseResult]:
        return {phase: PhaseResult(gaps_s=[itl], prefill_tokens_per_s=prefill, ttfts_s=[], failed=0) for phase in Phase}

    results = {PD: result(0.01, 500), "a": result(0.02, 600), "b": result(0.05, 910), "c": result(0.09, 1000)}
    assert best_aggregated(Phase.AT_RATE, results) == "b"


def test_a_job_survives_the_pipe() -> None:
    job = Job(
        model="m",
        dtype="bfloat16",
        threads=2,
        max_model_len=10,
        pool_tokens=99,
        tasks=[Task(name="warm-up", prompts=[[1, 2]], max_tokens=1)],
        options={"page_size": 16},
    )
    assert Job.from_json(job.to_json()) == job


def test_memory_of_living_processes_is_added_up() -> None:
    groups = pss_by_name([os.getpid(), 2**22 + 1])
    assert [len(sizes) for sizes in groups.values()] == [1]
    assert total_pss([os.getpid()]) > 1 << 20
