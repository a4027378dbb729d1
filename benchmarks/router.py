"""What the router itself costs: latency it adds, and requests and tokens that one core of it carries.

The router's application runs under uvicorn, as in Ray Serve, before replicas without a model that answer at once
(links, rooms and frames are real). Beside it, in turn, a bare aiohttp server that answers by itself. Latency is that of
whole answers of one token to a short chat message; *added* is the router's less the bare server's. What a core carries
is work done per second of the server's own processor time, so the share of client and replicas is left out.

    python -m benchmarks.router --model ~/.cache/pd-serve/SmolLM2-135M-Instruct --write
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

from benchmarks.report import Report, Table, add_report_options, configuration, finish
from benchmarks.stats import median, milliseconds
from benchmarks.workers.replica_stand_in import SECRET_VARIABLE

ROUTER, BARE = "router", "bare aiohttp"
_MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
_READY_S = 60.0
_STOP_S = 10.0


@dataclass
class Figures:
    """Of one server and one number of clients."""

    latencies_s: list[float] = field(default_factory=list)
    requests_per_cpu_s: list[float] = field(default_factory=list)
    tokens_per_cpu_s: list[float] = field(default_factory=list)


Results = dict[tuple[int, str], Figures]


def main() -> None:
    arguments = _parse()
    results = asyncio.run(_measure(arguments))
    finish(_report(arguments, results), arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="overhead of the router against an engine stand-in")
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer and the chat template")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests", type=int, default=1000, help="of one token, in each round")
    parser.add_argument("--streams", type=int, default=32, help="in each round")
    parser.add_argument("--stream-tokens", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ports", type=int, nargs=2, default=[8311, 8312])
    add_report_options(parser)
    return parser.parse_args()


async def _measure(arguments: argparse.Namespace) -> Results:
    results: Results = defaultdict(Figures)
    async with (
        _servers(arguments) as servers,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        for number in range(arguments.rounds + 1):
            for clients in arguments.clients:
                for name, (url, process) in servers.items():
                    figures = results[clients, name] if number else Figures()  # the first round warms up
                    await _one_token(session, url, process, clients, arguments.requests, figures)
                    await _streams(session, url, process, clients, arguments, figures)
    return results


async def _one_token(
    session: aiohttp.ClientSession, url: str, process: psutil.Process, clients: int, requests: int, figures: Figures
) -> None:
    body = {"messages": _MESSAGES, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    left = iter(range(requests))

    async def client() -> None:
        for _ in left:
            began = time.perf_counter()
            async with session.post(url, json=body) as response:
                await response.read()
                response.raise_for_status()
            figures.latencies_s.append(time.perf_counter() - began)

    before = _cpu_s(process)
    await asyncio.gather(*(client() for _ in range(clients)))
    figures.requests_per_cpu_s.append(requests / (_cpu_s(process) - before))


async def _streams(
    session: aiohttp.ClientSession,
    url: str,
    process: psutil.Process,
    clients: int,
    arguments: argparse.Namespace,
    figures: Figures,
) -> None:
    body = {"messages": _MESSAGES, "max_tokens": arguments.stream_tokens, "temperature": 0, "stream": True}
    body["ignore_eos"] = True
    left = iter(range(arguments.streams))

    async def client() -> None:
        for _ in left:
            async with session.post(url, json=body) as response:
                response.raise_for_status()
                end = b""
                async for piece in response.content.iter_any():
                    end = (end + piece)[-32:]
                if b"[DONE]" not in end:
                    raise RuntimeError(f"a stream ended with {end!r}")

    before = _cpu_s(process)
    await asyncio.gather(*(client() for _ in range(clients)))
    figures.tokens_per_cpu_s.append(arguments.streams * arguments.stream_tokens / (_cpu_s(process) - before))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.asynccontextmanager
async def _servers(arguments: argparse.Namespace) -> AsyncIterator[dict[str, tuple[str, psutil.Process]]]:
    """Both servers' chat URLs and processes, by name."""
    environment = os.environ | {SECRET_VARIABLE: os.urandom(16).hex()}
    with contextlib.ExitStack() as stack:

        def start(module: str, *options: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", f"benchmarks.workers.{module}", *options]
            process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(_end, process)
            return process

        replicas = start("replica_stand_in")
        assert replicas.stdout is not None
        members = json.dumps(json.loads(await asyncio.to_thread(replicas.stdout.readline)))
        own, bare = (str(port) for port in arguments.ports)
        processes = {
            ROUTER: start("router_server", "--model", str(arguments.model), "--members", members, "--port", own),
            BARE: start("bare_server", "--port", bare),
        }
        servers = {}
        for (name, process), port in zip(processes.items(), (own, bare), strict=True):
            await _wait_ready(name, process, f"http://127.0.0.1:{port}/health")
            servers[name] = (f"http://127.0.0.1:{port}/v1/chat/completions", psutil.Process(process.pid))
        yield servers


async def _wait_ready(name: str, process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + _READY_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(url) as response:
                    if response.status == 200 and (await response.json())["status"] == "ok":
                        return
            await asyncio.sleep(0.1)
    raise RuntimeError(f"the {name} did not answer {url} (exit status {process.poll()})")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _report(arguments: argparse.Namespace, results: Results) -> Report:
    table = Table(
        title="Router and bare server",
        columns=["clients", "server", "latency p50 (ms)", "added (ms)", "requests/s of a core", "tokens/s of a core"],
    )
    for clients in arguments.clients:
        base = median(results[clients, BARE].latencies_s)
        for name in (BARE, ROUTER):
            figures = results[clients, name]
            middle = median(figures.latencies_s)
            added = None if name == BARE or middle is None or base is None else middle - base
            table.add(
                clients,
                name,
                milliseconds(middle),
                milliseconds(added),
                median(figures.requests_per_cpu_s),
                median(figures.tokens_per_cpu_s),
            )
    return Report(
        name="router",
        purpose="Latency the router adds, and what one core of it carries, before replicas that answer at once.",
        configuration=configuration(arguments),
        tables=[table],
        notes=[
            "The bare server answers by itself: no tokeniser, no template, no validation, no replica behind it.",
            "Requests are answered with one token; streams carry tokens as fast as client, server and replicas can.",
        ],
    )


if __name__ == "__main__":
    main()
