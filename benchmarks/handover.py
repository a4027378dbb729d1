"""How long a request is in nobody's batch: from prefill's first token to the start of decode's first step.

Seen from the client: the second token comes one decode step after decode began, so the handover is the gap between
the first two tokens less a decode step (the median of the request's later gaps). Aggregated mode, with as many threads
as the prefill replica has, is measured in the same run: there the same difference is what the method itself adds, and
the difference of the times to first token is what disaggregation adds before it. Requests are sent one at a time,
undisturbed and beside other streams, with the systems in alternation.

    python -m benchmarks.handover --config deploy/config.yaml --write
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.configured import add_configured_options, aggregated_settings, configured_systems, pd_settings
from benchmarks.http_client import Completion, CompletionClient
from benchmarks.mixed_load import background_streams
from benchmarks.report import Report, Table, add_report_options, finish
from benchmarks.stats import median, milliseconds, percentile
from benchmarks.systems import System, running
from benchmarks.workload import random_prompt

PD = "PD"
AGGREGATED = "aggregated"
STREAM_PROMPT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Case:
    system: str
    streams: int
    prompt_tokens: int


Results = Mapping[Case, list[Completion]]


def main() -> None:
    arguments = _parse()
    results = asyncio.run(_measure(arguments))
    finish(_report(arguments, results), arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="time between prefill's last and decode's first computation")
    add_configured_options(parser)
    parser.add_argument("--threads", type=int, default=1, help="of each replica")
    parser.add_argument("--chunk", type=int, default=512, metavar="TOKENS", help="chunk size of prefill and aggregated")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[64, 512, 1500])
    parser.add_argument("--streams", type=int, nargs="+", default=[0, 8], help="decoding beside the measured request")
    parser.add_argument("--stream-tokens", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=20, help="of each length in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    add_report_options(parser)
    return parser.parse_args()


async def _measure(arguments: argparse.Namespace) -> Results:
    settings = {
        PD: pd_settings(threads=2 * arguments.threads, chunk=arguments.chunk),
        AGGREGATED: aggregated_settings(threads=arguments.threads, chunk=arguments.chunk),
    }
    results: dict[Case, list[Completion]] = defaultdict(list)
    for number in range(arguments.rounds):
        for system in configured_systems(settings, arguments):
            print(f"round {number + 1} of {arguments.rounds}: {system.name}", file=sys.stderr, flush=True)
            rng = random.Random(f"handover {arguments.seed} {number}")
            async with (
                running(system, ready_s=arguments.ready_s, log_folder=arguments.logs),
                CompletionClient(system.url) as client,
            ):
                for case, done in (await _measure_system(system, client, rng, arguments)).items():
                    results[case] += done
    return results


async def _measure_system(
    system: System, client: CompletionClient, rng: random.Random, arguments: argparse.Namespace
) -> dict[Case, list[Completion]]:
    """Every case of one system, a warm-up request before each."""
    results: dict[Case, list[Completion]] = {}
    for streams in arguments.streams:
        streaming = background_streams(
            client,
            rng,
            streams=streams,
            prompt_tokens=STREAM_PROMPT_TOKENS,
            stream_tokens=arguments.stream_tokens,
        )
        async with streaming:
            for length in arguments.prompt_tokens:
                done = [
                    await client.complete(random_prompt(rng, length), max_tokens=arguments.output_tokens)
                    for _ in range(1 + arguments.requests)
                ]
                results[Case(system=system.name, streams=streams, prompt_tokens=length)] = done[1:]
    return results


def _report(arguments: argparse.Namespace, results: Results) -> Report:
    table = Table(
        title="Handover as the client sees it",
        columns=[
            "system",
            "other streams",
            "prompt tokens",
            "TTFT p50 (ms)",
            "decode step p50 (ms)",
            "handover p50 (ms)",
            "handover p90 (ms)",
            "handover p50 (steps)",
            "failed",
        ],
    )
    for case in sorted(results, key=lambda case: (case.streams, case.prompt_tokens, case.system != PD)):
        served = [done for done in results[case] if done.error is None]
        step = median([gap for done in served for gap in done.gaps_s[1:]])
        handovers = [] if step is None else [done.gaps_s[0] - step for done in served]
        middle = median(handovers)
        table.add(
            case.system,
            case.streams,
            case.prompt_tokens,
            milliseconds(median([done.ttft_s for done in served])),
            milliseconds(step),
            milliseconds(middle),
            milliseconds(percentile(handovers, 90)),
            None if middle is None or step is None else middle / step,
            len(results[case]) - len(served),
        )
    configuration = {key: str(value) for key, value in vars(arguments).items() if key not in ("write", "results")}
    return Report(
        name="handover",
        purpose="Time from prefill's first token to the start of decode's first step; aggregated mode for comparison.",
        configuration=configuration,
        tables=[table],
        notes=["Handover: gap between the first two tokens less the median decode step."],
    )


if __name__ == "__main__":
    main()
