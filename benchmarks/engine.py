"""Offline throughput of the engine alone, and of vLLM's CPU build in the same run.

Each round starts every engine in a fresh process, one after the other with nothing else running, gives them the same
prompts (random token ids, none sharing a prefix) and the same threads, and reports medians over the rounds:
start-up (process start to first token), generated tokens/s with N streams at once, prompt tokens/s of single prompts.

    python -m benchmarks.engine --model FOLDER --peer-python /path/to/peer/bin/python --write
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Report, Table, add_report_options, configuration, finish
from benchmarks.workers.job import Job, Task
from benchmarks.workload import random_prompt

START_UP = "start-up to first token (s)"
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    command: list[str]
    environment: Mapping[str, str]
    options: Mapping[str, object]


def main() -> None:
    arguments = _parse()
    contenders = _contenders(arguments)
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    for round_number in range(arguments.rounds):
        tasks = _tasks(arguments, seed=round_number)
        for contender in contenders:
            print(f"round {round_number + 1} of {arguments.rounds}: {contender.name}", file=sys.stderr, flush=True)
            for measure, value in _measure(contender, tasks, arguments).items():
                samples[contender.name, measure].append(value)
    measures = [START_UP, *_task_measures(arguments).values()]
    names = [contender.name for contender in contenders]
    finish(_report(arguments, names, measures, samples), arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="offline throughput of the engine, beside a peer's")
    parser.add_argument("--model", required=True, help="folder with safetensors weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=32, help="prompt of each stream")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens each stream generates")
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 2048], help="prompt lengths")
    parser.add_argument("--prefill-prompts", type=int, default=4, help="prompts of each length, one after the other")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool-tokens", type=int, default=65_536, help="KV cache of our engine")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: further fields of EngineConfig")
    parser.add_argument("--peer-python", help="Python of an environment with vLLM for CPU; without it, no peer")
    parser.add_argument("--peer-options", type=json.loads, default={}, help="JSON: further arguments of vllm.LLM")
    parser.add_argument("--peer-kvcache-gib", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=900, help="for one engine in one round")
    add_report_options(parser)
    return parser.parse_args()


def _contenders(arguments: argparse.Namespace) -> list[Contender]:
    own = Contender(
        name="ours",
        command=[sys.executable, "-m", "benchmarks.workers.own_engine"],
        environment={},
        options=arguments.options,
    )
    if arguments.peer_python is None:
        return [own]
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    peer = Contender(
        name="vLLM CPU",
        command=[arguments.peer_python, "-m", "benchmarks.workers.vllm_cpu"],
        environment={
            "VLLM_CPU_KVCACHE_SPACE": str(arguments.peer_kvcache_gib),
            # Left alone it takes one thread for each physical core, which can be fewer than it is given here.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        options=arguments.peer_options,
    )
    return [own, peer]


def _tasks(arguments: argparse.Namespace, *, seed: int) -> list[Task]:
    """The warm-up, then every measure's task under that measure's name."""
    rng = random.Random(f"engine {seed}")
    tasks = [Task(name="warm-up", prompts=[random_prompt(rng, arguments.prompt_tokens)], max_tokens=1)]
    for streams in arguments.streams:
        prompts = [random_prompt(rng, arguments.prompt_tokens) for _ in range(streams)]
        tasks.append(Task(name=f"decode {streams}", prompts=prompts, max_tokens=arguments.new_tokens))
    for length in arguments.prefill:
        for _ in range(arguments.prefill_prompts):
            tasks.append(Task(name=f"prefill {length}", prompts=[random_prompt(rng, length)], max_tokens=1))
    return tasks


def _task_measures(arguments: argparse.Namespace) -> dict[str, str]:
    """Task name to the measure it is reported as."""
    decode = {f"decode {n}": f"generated tokens/s, {n} stream{'s' * (n > 1)}" for n in arguments.streams}
    prefill = {f"prefill {n}": f"prompt tokens/s, {n} tokens" for n in arguments.prefill}
    return {**decode, **prefill}


def _measure(contender: Contender, tasks: list[Task], arguments: argparse.Namespace) -> dict[str, float]:
    """One engine's measures in one round. Raises RuntimeError with the end of its output when it fails."""
    job = Job(
        model=arguments.model,
        dtype=arguments.dtype,
        threads=arguments.threads,
        max_model_len=max(arguments.prefill) + arguments.new_tokens + 64,
        pool_tokens=arguments.pool_tokens,
        tasks=tasks,
        options=dict(contender.options),
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), **contender.environment}
    with tempfile.TemporaryFile("w+") as log:
        started = time.monotonic()
        done = subprocess.run(
            contender.command,
            input=job.to_json(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            cwd=ROOT,
            timeout=arguments.timeout_s,
            check=False,
        )
        if done.returncode != 0:
            log.seek(0)
            raise RuntimeError(f"{contender.name} ended with status {done.returncode}:\n{log.read()[-3000:]}")
    return _values([json.loads(line) for line in done.stdout.splitlines()], tasks, started, _task_measures(arguments))


def _values(
    lines: list[dict[str, object]], tasks: list[Task], started: float, names: dict[str, str]
) -> dict[str, float]:
    """Measures of one worker's answer; tasks of one name are added up: tokens over seconds."""
    values: dict[str, float] = {}
    seconds: dict[str, float] = defaultdict(float)
    for line in lines:
        if line["event"] == "ready":
            values[START_UP] = float(str(line["at"])) - started
        else:
            seconds[str(line["name"])] += float(str(line["seconds"]))
    for name, measure in names.items():
        own = [task for task in tasks if task.name == name]
        if name.startswith("prefill"):
            tokens = sum(len(prompt) for task in own for prompt in task.prompts)
        else:
            tokens = sum(len(task.prompts) * task.max_tokens for task in own)
        values[measure] = tokens / seconds[name]
    return values


def _report(
    arguments: argparse.Namespace, names: list[str], measures: list[str], samples: Mapping[tuple[str, str], list[float]]
) -> Report:
    middle = {key: statistics.median(values) for key, values in samples.items()}
    table = Table(title="Medians", columns=["measure", *names, *(["ours / peer"] if len(names) > 1 else [])])
    for measure in measures:
        row = [middle[name, measure] for name in names]
        table.add(measure, *row, *([f"{row[0] / row[1]:.2f}"] if len(row) > 1 else []))
    spread = Table(title="Every round", columns=["measure", *names])
    for measure in measures:
        spread.add(measure, *(", ".join(f"{value:,.4g}" for value in samples[name, measure]) for name in names))
    return Report(
        name="engine",
        purpose="Offline throughput and start-up of the engine alone, each engine in a fresh process in each round.",
        configuration=configuration(arguments, but=("peer_python",)),
        tables=[table, spread],
        notes=[
            "Generated tokens/s: all streams submitted at once; tokens generated over the time to the last one.",
            "Prompt tokens/s: one prompt at a time, one token generated.",
            "vLLM compiles kernels at its first start on a machine and caches them: see its start-up by round.",
        ],
    )


if __name__ == "__main__":
    main()
