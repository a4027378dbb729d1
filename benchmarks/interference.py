"""What disaggregation promises: long prompts that arrive do not disturb the streams that decode.

On the same cores: PD with one prefill and one decode replica of half the threads each, against aggregated mode with
all of them, at several chunk sizes. Each system is started in turn from a configuration derived from `--config`, and
meets the same load: streams that decode, first undisturbed, then with long prompts arriving at a rate, then with
prompts always waiting. Aggregated mode is represented by the chunk size with the lowest p99 ITL among those that
reach at least 90% of the best prefill throughput of all chunk sizes.

    python -m benchmarks.interference --config deploy/config.yaml --write
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping

from benchmarks.configured import add_configured_options, aggregated_settings, configured_systems, pd_settings
from benchmarks.http_client import CompletionClient
from benchmarks.mixed_load import MixedLoad, Phase, PhaseResult, run_mixed
from benchmarks.report import Report, Table, add_report_options, configuration, finish
from benchmarks.stats import milliseconds, percentile
from benchmarks.systems import System, running

PD = "PD"
MIN_SHARE_OF_PREFILL = 0.9
Results = Mapping[str, Mapping[Phase, PhaseResult]]


def main() -> None:
    arguments = _parse()
    results = asyncio.run(_measure(arguments))
    finish(_report(arguments, results), arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="ITL of running streams while long prompts arrive: PD and aggregated")
    add_configured_options(parser)
    parser.add_argument("--threads", type=int, default=2, help="of aggregated mode; PD's two replicas get half each")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048], metavar="TOKENS")
    parser.add_argument("--pd-chunk", type=int, default=512, metavar="TOKENS", help="chunk size of the prefill replica")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--stream-prompt-tokens", type=int, default=64)
    parser.add_argument("--stream-tokens", type=int, default=1024)
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--prompt-output-tokens", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.3, help="long prompts per second in the middle phase")
    parser.add_argument("--outstanding", type=int, default=3, help="long prompts under way in the last phase")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each phase")
    parser.add_argument("--seed", type=int, default=0)
    add_report_options(parser)
    return parser.parse_args()


async def _measure(arguments: argparse.Namespace) -> Results:
    load = MixedLoad(
        streams=arguments.streams,
        stream_prompt_tokens=arguments.stream_prompt_tokens,
        stream_tokens=arguments.stream_tokens,
        prompt_tokens=arguments.prompt_tokens,
        prompt_output_tokens=arguments.prompt_output_tokens,
        rate=arguments.rate,
        outstanding=arguments.outstanding,
        seconds=arguments.seconds,
        seed=arguments.seed,
    )
    results = {}
    for system in _systems(arguments):
        print(system.name, file=sys.stderr, flush=True)
        async with (
            running(system, ready_s=arguments.ready_s, log_folder=arguments.logs),
            CompletionClient(system.url) as client,
        ):
            results[system.name] = await run_mixed(client, load)
    return results


def _systems(arguments: argparse.Namespace) -> list[System]:
    """PD first, then aggregated mode at each chunk size; writes their configurations beside the logs."""
    settings = {PD: pd_settings(threads=arguments.threads, chunk=arguments.pd_chunk)}
    for chunk in arguments.chunks:
        settings[f"aggregated {chunk}"] = aggregated_settings(threads=arguments.threads, chunk=chunk)
    return configured_systems(settings, arguments)


def _report(arguments: argparse.Namespace, results: Results) -> Report:
    tables = []
    for phase in Phase:
        table = Table(
            title=f"{phase.value.capitalize()}: {_describe(phase, arguments)}",
            columns=[
                "system",
                "ITL p50 (ms)",
                "ITL p99 (ms)",
                "ITL max (ms)",
                "prefill tokens/s",
                "TTFT p50 (ms)",
                "failed",
            ],
        )
        for name, phases in results.items():
            found = phases[phase]
            table.add(
                name,
                *(milliseconds(percentile(found.gaps_s, percent)) for percent in (50, 99, 100)),
                found.prefill_tokens_per_s,
                milliseconds(percentile(found.ttfts_s, 50)),
                found.failed,
            )
        tables.append(table)
    return Report(
        name="interference",
        purpose="Inter-token latency of running streams while long prompts arrive: PD and aggregated mode.",
        configuration=configuration(arguments),
        tables=tables,
        notes=[_verdict(phase, results) for phase in (Phase.AT_RATE, Phase.SATURATED)],
    )


def _describe(phase: Phase, arguments: argparse.Namespace) -> str:
    streams = f"{arguments.streams} streams"
    prompts = f"prompts of {arguments.prompt_tokens:,} tokens"
    return {
        Phase.QUIET: f"{streams} alone",
        Phase.AT_RATE: f"{streams}, {arguments.rate:g} {prompts} per second",
        Phase.SATURATED: f"{streams}, {arguments.outstanding} {prompts} always under way",
    }[phase]


def _verdict(phase: Phase, results: Results) -> str:
    """PD against the aggregated chunk size that stands for aggregated mode in this phase."""
    best = best_aggregated(phase, results)
    pd, other = results[PD][phase], results[best][phase]
    pd_p99, other_p99 = percentile(pd.gaps_s, 99), percentile(other.gaps_s, 99)
    if pd_p99 is None or other_p99 is None:
        return f"{phase.value}: too few tokens to compare"
    return (
        f"{phase.value}: p99 ITL {pd_p99 * 1e3:.1f} ms in PD, {other_p99 * 1e3:.1f} ms in {best} "
        f"({pd_p99 / other_p99:.2f} of it); prefill {_rate(pd)} and {_rate(other)} tokens/s"
    )


def _rate(result: PhaseResult) -> str:
    return "?" if result.prefill_tokens_per_s is None else f"{result.prefill_tokens_per_s:,.0f}"


def best_aggregated(phase: Phase, results: Results) -> str:
    """The system other than PD with the lowest p99 ITL of those that, saturated, reach 90% of the best prefill rate."""
    rates = {
        name: phases[Phase.SATURATED].prefill_tokens_per_s or 0.0 for name, phases in results.items() if name != PD
    }
    enough = MIN_SHARE_OF_PREFILL * max(rates.values())
    fit = [name for name, rate in rates.items() if rate >= enough]
    return min(fit, key=lambda name: percentile(results[name][phase].gaps_s, 99) or float("inf"))


if __name__ == "__main__":
    main()
