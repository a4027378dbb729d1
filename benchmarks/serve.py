"""Open-loop load over HTTP against any OpenAI-compatible server, or against several in alternation.

    python -m benchmarks.serve --system ours=http://127.0.0.1:8000 --rate 2 --requests 100 --prompt 64:512
    python -m benchmarks.serve --system pd=http://127.0.0.1:8000 --system agg=http://127.0.0.1:8001 \\
        --start 'pd=COMMAND' --start 'agg=COMMAND' --trace ../shared/traces/mooncake_conversation.jsonl

In every round each system gets the same requests. Those with a start command live one at a time, in each round anew.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.http_client import CompletionClient
from benchmarks.load import LoadResult, Slo, run_open_loop
from benchmarks.memory import MIB, total_pss
from benchmarks.report import Cell, Report, Table, add_report_options, configuration, finish
from benchmarks.stats import median, milliseconds, percentile
from benchmarks.systems import System, add_system_options, parse_systems, running
from benchmarks.workload import Lengths, WorkItem, poisson, replay
from cluster.process_tree import descendants

PERCENTS = (50, 90, 99)


def main() -> None:
    arguments = _parse()
    results, memory = asyncio.run(_measure(arguments))
    finish(_report(arguments, results, memory), arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="open-loop load over HTTP")
    add_system_options(parser)
    parser.add_argument("--requests", type=int, default=100, help="in each round")
    parser.add_argument("--rate", type=float, default=1.0, help="arrivals per second (Poisson)")
    parser.add_argument("--prompt", type=Lengths.parse, default=Lengths(low=128, high=128), metavar="N|LOW:HIGH")
    parser.add_argument("--output", type=Lengths.parse, default=Lengths(low=64, high=64), metavar="N|LOW:HIGH")
    parser.add_argument("--trace", type=Path, help="replay this trace instead of Poisson arrivals and random lengths")
    parser.add_argument("--trace-block", type=int, default=16, help="tokens that stand for a trace's block of 512")
    parser.add_argument("--trace-speed", type=float, default=1.0, help="how many times faster its time runs")
    parser.add_argument("--trace-max-tokens", type=int, default=4096, help="leave out requests longer than this")
    parser.add_argument("--slo-ttft-ms", type=float, default=2000.0)
    parser.add_argument("--slo-itl-ms", type=float, default=100.0, help="for each request's own 99th percentile")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=4, help="requests before each measurement, not counted")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="for one request")
    parser.add_argument("--seed", type=int, default=0)
    add_report_options(parser)
    return parser.parse_args()


async def _measure(arguments: argparse.Namespace) -> tuple[dict[str, list[LoadResult]], dict[str, list[int]]]:
    """Results by system, one a round; and the PSS in bytes of those systems that were started here."""
    systems = parse_systems(arguments.system, arguments.start)
    results: dict[str, list[LoadResult]] = defaultdict(list)
    memory: dict[str, list[int]] = defaultdict(list)
    for number in range(arguments.rounds):
        items, warmup = _workload(arguments, f"{arguments.seed} {number}")
        for system in systems:
            print(f"round {number + 1} of {arguments.rounds}: {system.name}", file=sys.stderr, flush=True)
            async with running(system, ready_s=arguments.ready_s, log_folder=arguments.logs):
                results[system.name].append(await _load(system, items, warmup, arguments.timeout_s))
                if system.command is not None:
                    memory[system.name].append(total_pss(descendants()))
    return results, memory


def _workload(arguments: argparse.Namespace, seed: str) -> tuple[list[WorkItem], list[WorkItem]]:
    """The requests to count and those to warm up with; none of the latter shares a prefix with the former."""
    warmup = poisson(
        rate=arguments.rate,
        count=arguments.warmup,
        prompts=arguments.prompt,
        outputs=arguments.output,
        seed=f"w {seed}",
    )
    if arguments.trace is None:
        items = poisson(
            rate=arguments.rate, count=arguments.requests, prompts=arguments.prompt, outputs=arguments.output, seed=seed
        )
    else:
        items = replay(
            arguments.trace,
            count=arguments.requests,
            block=arguments.trace_block,
            speed=arguments.trace_speed,
            max_tokens=arguments.trace_max_tokens,
            seed=seed,
        )
    return items, warmup


async def _load(system: System, items: list[WorkItem], warmup: list[WorkItem], timeout_s: float) -> LoadResult:
    async with CompletionClient(system.url, timeout_s=timeout_s) as client:
        for item in warmup:
            await client.complete(item.prompt, max_tokens=item.output_tokens)
        return await run_open_loop(client, items)


def _report(
    arguments: argparse.Namespace, results: dict[str, list[LoadResult]], memory: dict[str, list[int]]
) -> Report:
    slo = Slo(ttft_s=arguments.slo_ttft_ms / 1e3, itl_s=arguments.slo_itl_ms / 1e3)
    latency = Table(title="Latency (ms)", columns=["system", "measure", "mean", *(f"p{p}" for p in PERCENTS)])
    rates = Table(
        title="Throughput, all rounds",
        columns=[
            "system",
            "requests/s",
            "prompt tokens/s",
            "output tokens/s",
            "cached prompt",
            "goodput (requests/s)",
            "in SLO",
            "failed",
            "client lag (ms)",
            "PSS (MiB)",
        ],
    )
    notes = [f"Goodput: TTFT up to {arguments.slo_ttft_ms:g} ms and p99 of ITL up to {arguments.slo_itl_ms:g} ms."]
    for name, rounds in results.items():
        for measure, values in _latencies(rounds).items():
            mean = sum(values) / len(values) if values else None
            latency.add(name, measure, *(milliseconds(x) for x in (mean, *(percentile(values, p) for p in PERCENTS))))
        rates.add(name, *_rates(rounds, slo), median([size / MIB for size in memory[name]]))
        notes += [f"{name} failed a request: {error}" for result in rounds for error in result.errors[:3]]
    return Report(
        name="serve",
        purpose="Open-loop load over HTTP: what clients see of the systems, each given the same requests.",
        configuration=configuration(arguments),
        tables=[latency, rates],
        notes=notes,
    )


def _latencies(rounds: Sequence[LoadResult]) -> dict[str, list[float]]:
    """Seconds over all rounds' answered requests."""
    served = [done for result in rounds for done in result.served]
    return {
        "TTFT": [done.ttft_s for done in served],
        "TPOT": [done.tpot_s for done in served if done.tpot_s is not None],
        "ITL": [gap for done in served for gap in done.gaps_s],
        "whole request": [done.ended - done.started for done in served],
    }


def _rates(rounds: Sequence[LoadResult], slo: Slo) -> list[Cell]:
    """The cells of the throughput table from requests/s to client lag."""
    seconds = sum(result.seconds for result in rounds)
    everything = [done for result in rounds for done in result.completions]
    served = [done for result in rounds for done in result.served]
    prompt_tokens = sum(done.prompt_tokens for done in served)
    cached = sum(done.cached_tokens for done in served)
    kept = sum(map(slo.kept_by, served))
    return [
        len(served) / seconds,
        prompt_tokens / seconds,
        sum(done.output_tokens for done in served) / seconds,
        f"{cached / prompt_tokens:.0%}" if prompt_tokens else None,
        kept / seconds,
        f"{kept / len(everything):.0%}",
        len(everything) - len(served),
        max(result.worst_lag_s for result in rounds) * 1e3,
    ]


if __name__ == "__main__":
    main()
