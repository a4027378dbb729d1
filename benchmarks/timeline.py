"""Sends requests to a running cluster, asks where their time went, and writes that as a trace for Perfetto.

Prompts are random token ids, others in each run unless a seed is given, so that no prefix cache helps. A table of the
phases' durations is printed; the trace is opened at https://ui.perfetto.dev or in chrome://tracing. docs/timelines.md
says what the phases mean.

    python -m benchmarks.timeline --url http://127.0.0.1:8000 --prompt-tokens 1500 --out trace.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.report import Report, Table, add_report_options, configuration, finish
from benchmarks.stats import median, percentile
from benchmarks.trace import chrome_trace
from benchmarks.workload import random_prompt

Timelines = dict[str, dict[str, Any]]


class RequestFailed(RuntimeError):
    """The server did not answer a request, or told no timeline."""


def main() -> None:
    arguments = _parse()
    asking = fetch_timelines(
        arguments.url,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        requests=arguments.requests,
        concurrency=arguments.concurrency,
        seed=arguments.seed,
        timeout_s=arguments.timeout,
    )
    try:
        timelines = asyncio.run(asking)
    except RequestFailed as error:
        sys.exit(str(error))
    arguments.out.write_text(json.dumps(chrome_trace(timelines)))
    finish(_report(arguments, timelines), arguments)
    print(f"\n{arguments.out}: open it at https://ui.perfetto.dev")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="where the time of requests goes, as a trace for Perfetto")
    parser.add_argument("--url", required=True, help="of a running cluster, without /v1")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=1, help="requests under way at once")
    parser.add_argument("--seed", type=int, help="of the prompts; another one in each run unless given")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of one request")
    parser.add_argument("--out", type=Path, required=True, help="file for the trace")
    add_report_options(parser)
    return parser.parse_args()


async def fetch_timelines(
    url: str,
    *,
    prompt_tokens: int,
    output_tokens: int,
    requests: int,
    concurrency: int,
    seed: int | None,
    timeout_s: float,
) -> Timelines:
    """The timeline of each request by its name; raises `RequestFailed` for the first that has none."""
    rng = random.Random(seed)
    prompts = [random_prompt(rng, prompt_tokens) for _ in range(requests)]
    places = asyncio.Semaphore(concurrency)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session:

        async def ask(number: int) -> tuple[str, dict[str, Any]]:
            async with places:
                return f"request {number}", await _ask(session, url, prompts[number], output_tokens)

        return dict(await asyncio.gather(*(ask(number) for number in range(requests))))


async def _ask(session: aiohttp.ClientSession, url: str, prompt: list[int], output_tokens: int) -> dict[str, Any]:
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": output_tokens, "temperature": 0, "ignore_eos": True},
        "return_timeline": True,
    }
    try:
        async with session.post(f"{url.rstrip('/')}/generate", json=body) as response:
            if response.status != 200:
                raise RequestFailed(f"HTTP {response.status}: {(await response.text())[:300]}")
            timeline = (await response.json())["meta_info"].get("timeline")
    except (aiohttp.ClientError, TimeoutError) as error:
        raise RequestFailed(f"no answer from {url}: {error!r}") from error
    if timeline is None:
        raise RequestFailed(f"{url} told no timeline; is it a cluster of this version?")
    return dict(timeline)


def phase_table(timelines: Mapping[str, Mapping[str, Any]]) -> Table:
    """How long the phases took, over all requests; copies of one request are added up."""
    per_request: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for request, timeline in timelines.items():
        for phase in timeline["phases"]:
            per_request[phase["replica"], phase["name"]][request] += phase["duration_ms"]
    table = Table(title="Phases, ms a request", columns=["replica", "phase", "requests", "p50", "p90", "most"])
    for (replica, name), by_request in per_request.items():
        took = list(by_request.values())
        table.add(replica, name, len(took), median(took), percentile(took, 90), max(took))
    for name in ("first_token_ms", "total_ms"):
        took = [timeline[name] for timeline in timelines.values()]
        table.add("client", name.removesuffix("_ms"), len(took), median(took), percentile(took, 90), max(took))
    return table


def _report(arguments: argparse.Namespace, timelines: Timelines) -> Report:
    return Report(
        name="timeline",
        purpose="Where the time of requests goes, as replicas measure it.",
        configuration=configuration(arguments),
        tables=[phase_table(timelines)],
        notes=["Copies overlap with compute; sums of all phases are no total."],
    )


if __name__ == "__main__":
    main()
