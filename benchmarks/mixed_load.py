"""Streams that decode while long prompts arrive: how much do the prompts disturb the streams, and how fast do they go?

`run_mixed` keeps a number of streams going the whole time (one that ends is followed by another) and measures them in
phases: quiet, without prompts; at a rate, prompts arriving at random; saturated, a few prompts always outstanding.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from benchmarks.http_client import Completion, CompletionClient
from benchmarks.workload import random_prompt


class Phase(enum.Enum):
    QUIET = "quiet"
    AT_RATE = "at rate"
    SATURATED = "saturated"


@dataclass(frozen=True, kw_only=True)
class MixedLoad:
    streams: int
    stream_prompt_tokens: int
    stream_tokens: int
    """Generated tokens after which a stream ends and another takes its place."""
    prompt_tokens: int
    prompt_output_tokens: int
    """Tokens generated after each long prompt; with more than one, PD hands its KV over."""
    rate: float
    """Long prompts per second in `Phase.AT_RATE` (Poisson)."""
    outstanding: int
    """Long prompts under way at any time in `Phase.SATURATED`."""
    seconds: float
    """Of each phase."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class PhaseResult:
    gaps_s: list[float]
    """Every inter-token latency of the streams that lay within the phase."""
    prefill_tokens_per_s: float | None
    """Prompt tokens from the first to the last first-token of a long prompt; None with fewer than two."""
    ttfts_s: list[float]
    """Of the long prompts whose first token came within the phase."""
    failed: int


async def run_mixed(client: CompletionClient, load: MixedLoad) -> dict[Phase, PhaseResult]:
    """All three phases, one after the other, against one server. Raises RuntimeError when a stream fails."""
    rng = random.Random(f"mixed {load.seed}")
    streaming = background_streams(
        client, rng, streams=load.streams, prompt_tokens=load.stream_prompt_tokens, stream_tokens=load.stream_tokens
    )
    async with streaming as records:
        results = {}
        for phase in Phase:
            prompts: list[Completion] = []
            began = time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(load.seconds):
                    await _send_prompts(phase, client, load, rng, prompts)
            results[phase] = _result(records, prompts, began, time.monotonic())
    return results


@contextlib.asynccontextmanager
async def background_streams(
    client: CompletionClient, rng: random.Random, *, streams: int, prompt_tokens: int, stream_tokens: int
) -> AsyncIterator[list[Completion]]:
    """Streams beside the body, all decoding when it begins; one that ends is followed by another of `stream_tokens`.

    Yields their growing records. Raises RuntimeError when one fails.
    """
    firsts = [Completion(prompt_tokens) for _ in range(streams)]
    records = list(firsts)

    async def keep_streaming(record: Completion) -> None:
        while True:
            await client.complete(random_prompt(rng, prompt_tokens), max_tokens=stream_tokens, into=record)
            if record.error is not None:
                raise RuntimeError(f"a stream failed: {record.error}")
            record = Completion(prompt_tokens)
            records.append(record)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(keep_streaming(first)) for first in firsts]
            for first in firsts:
                await first.begun.wait()
            yield records
            for task in tasks:
                task.cancel()
    except* RuntimeError as errors:
        raise errors.exceptions[0] from None


async def _send_prompts(
    phase: Phase, client: CompletionClient, load: MixedLoad, rng: random.Random, into: list[Completion]
) -> None:
    """Long prompts as the phase has them, until cancelled; those under way are then hung up on."""

    async def one() -> None:
        prompt = random_prompt(rng, load.prompt_tokens)
        record = Completion(len(prompt))
        into.append(record)
        await client.complete(prompt, max_tokens=load.prompt_output_tokens, into=record)

    async def one_after_another() -> None:
        while True:
            await one()

    async with asyncio.TaskGroup() as group:
        if phase is Phase.SATURATED:
            for _ in range(load.outstanding):
                group.create_task(one_after_another())
        elif phase is Phase.AT_RATE:
            while True:
                await asyncio.sleep(rng.expovariate(load.rate))
                group.create_task(one())
        else:
            await asyncio.Event().wait()


def _result(streams: Sequence[Completion], prompts: Sequence[Completion], began: float, ended: float) -> PhaseResult:
    gaps = [
        later - earlier
        for record in streams
        for earlier, later in zip(record.chunk_times, record.chunk_times[1:], strict=False)
        if began <= earlier and later <= ended
    ]
    started = sorted((done for done in prompts if done.chunk_times), key=lambda done: done.chunk_times[0])
    rate = None
    if len(started) > 1:
        # Counted from one first token to another, a prompt cut off at either end of the phase is no error.
        seconds = started[-1].chunk_times[0] - started[0].chunk_times[0]
        rate = sum(done.prompt_tokens for done in started[1:]) / seconds
    return PhaseResult(
        gaps_s=gaps,
        prefill_tokens_per_s=rate,
        ttfts_s=[done.ttft_s for done in started],
        # One that was still under way at the end has no end time.
        failed=sum(done.ended > 0 and done.error is not None for done in prompts),
    )
