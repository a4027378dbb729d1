"""How long a request is in nobody's batch: from prefill's first token to the start of decode's first step.

Seen from the client: the second token comes one decode step after decode began, so the handover is the gap between
the first two tokens less a decode step (the median of the request's later gaps). Aggregated mode, with as many threads
as the prefill replica has, is measured in the same run: there the same difference is what the method itself adds, and
the difference of the times to first token is what disaggregation adds before it. Requests are sent one at a time,
undisturbed and beside other streams, to both systems in turn, which run together: what is not asked does nothing.

    python -m benchmarks.handover --config deploy/config.yaml --write
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from benchmarks.configured import add_configured_options, aggregated_settings, configured_systems, pd_settings
from benchmarks.http_client import Completion, CompletionClient
from benchmarks.mixed_load import background_streams
from benchmarks.report import Report, Table, add_report_options, configuration, finish
from benchmarks.stats import added_percent, median, milliseconds, percentile
from benchmarks.systems import running
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
    parser.add_argument("--requests", type=int, default=3, help="of each length in each round")
    parser.add_argument("--rounds", type=int, default=10, help="after one to warm up")
    parser.add_argument("--seed", type=int, default=0)
    add_report_options(parser)
    return parser.parse_args()


async def _measure(arguments: argparse.Namespace) -> Results:
    systems = configured_systems(
        {
            PD: pd_settings(threads=2 * arguments.threads, chunk=arguments.chunk),
            AGGREGATED: aggregated_settings(threads=arguments.threads, chunk=arguments.chunk),
        },
        arguments,
    )
    rng = random.Random(f"handover {arguments.seed}")
    results: dict[Case, list[Completion]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(running(*systems, ready_s=arguments.ready_s, log_folder=arguments.logs))
        clients = [(system.name, await stack.enter_async_context(CompletionClient(system.url))) for system in systems]
        for number in range(1 + arguments.rounds):
            print(f"round {number} of {arguments.rounds}", file=sys.stderr, flush=True)
            for streams, length in itertools.product(arguments.streams, arguments.prompt_tokens):
                clients.reverse()
                for name, client in clients:
                    done = await _ask(client, rng, arguments, streams=streams, length=length)
                    if number > 0:  # the first round warms up
                        results[Case(system=name, streams=streams, prompt_tokens=length)] += done
    return results


async def _ask(
    client: CompletionClient, rng: random.Random, arguments: argparse.Namespace, *, streams: int, length: int
) -> list[Completion]:
    """Requests with prompts of `length` tokens, one at a time, beside so many streams."""
    streaming = background_streams(
        client, rng, streams=streams, prompt_tokens=STREAM_PROMPT_TOKENS, stream_tokens=arguments.stream_tokens
    )
    async with streaming:
        return [
            await client.complete(random_prompt(rng, length), max_tokens=arguments.output_tokens)
            for _ in range(arguments.requests)
        ]


def _report(arguments: argparse.Namespace, results: Results) -> Report:
    table = Table(
        title="Handover as the client sees it",
        columns=[
            "system",
            "other streams",
            "prompt tokens",
            "TTFT p50 (ms)",
            "added TTFT (%)",
            "decode step p50 (ms)",
            "handover p50 (ms)",
            "handover p90 (ms)",
            "handover p50 (steps)",
            "failed",
        ],
    )
    ttft_s = {case: median([done.ttft_s for done in asked if done.error is None]) for case, asked in results.items()}
    for case in sorted(results, key=lambda case: (case.streams, case.prompt_tokens, case.system != PD)):
        served = [done for done in results[case] if done.error is None]
        step = median([gap for done in served for gap in done.gaps_s[1:]])
        handovers = [] if step is None else [done.gaps_s[0] - step for done in served]
        middle = median(handovers)
        table.add(
            case.system,
            case.streams,
            case.prompt_tokens,
            milliseconds(ttft_s[case]),
            added_percent(ttft_s[replace(case, system=AGGREGATED)], ttft_s[case]) if case.system == PD else None,
            milliseconds(step),
            milliseconds(middle),
            milliseconds(percentile(handovers, 90)),
            None if middle is None or step is None else middle / step,
            len(results[case]) - len(served),
        )
    return Report(
        name="handover",
        purpose="Time from prefill's first token to the start of decode's first step; aggregated mode for comparison.",
        configuration=configuration(arguments),
        tables=[table],
        notes=["Handover: gap between the first two tokens less the median decode step."],
    )


if __name__ == "__main__":
    main()
