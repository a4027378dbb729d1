"""The benchmarks' HTTP client and open loop, against small streaming servers of known behaviour."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.http_client import Completion, CompletionClient
from benchmarks.load import Slo, run_open_loop
from benchmarks.mixed_load import MixedLoad, Phase, background_streams, run_mixed
from benchmarks.workload import WorkItem

Write = Callable[[str], Awaitable[None]]


def event(text: str = "", *, finish: str | None = None, usage: dict[str, object] | None = None) -> str:
    choices = [] if usage else [{"index": 0, "text": text, "finish_reason": finish}]
    return "data: " + json.dumps({"object": "text_completion", "choices": choices, "usage": usage}) + "\n\n"


async def whole_answer(write: Write, body: dict[str, object]) -> None:
    for token in range(int(str(body["max_tokens"]))):
        await write(event(f" t{token}"))
    await write(event(finish="length"))
    usage = {"prompt_tokens": 3, "completion_tokens": body["max_tokens"], "prompt_tokens_details": {"cached_tokens": 2}}
    await write(event(usage=usage))
    await write("data: [DONE]\n\n")


async def cut_short(write: Write, body: dict[str, object]) -> None:
    await write(event(" only"))


async def error_in_stream(write: Write, body: dict[str, object]) -> None:
    await write(event(" first"))
    await write('data: {"error": {"message": "replica lost"}}\n\n')


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """Start a server that answers in the given way; returns its URL."""
    servers: list[TestServer] = []

    async def start(answer: Callable[[Write, dict[str, object]], Awaitable[None]]) -> str:
        async def completions(request: web.Request) -> web.StreamResponse:
            body = await request.json()
            if body["model"] != "tiny":
                return web.json_response({"error": {"message": "no such model"}}, status=404)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await answer(lambda text: response.write(text.encode()), body)
            return response

        async def models(_: web.Request) -> web.Response:
            return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

        app = web.Application()
        app.add_routes([web.post("/v1/completions", completions), web.get("/v1/models", models)])
        server = TestServer(app)
        servers.append(server)
        await server.start_server()
        return str(server.make_url("/"))

    yield start
    for server in servers:
        await server.close()


async def test_a_whole_answer_is_timed_token_by_token(serve: Callable[..., Awaitable[str]]) -> None:
    async with CompletionClient(await serve(whole_answer)) as client:
        done = await client.complete([1, 2, 3], max_tokens=5)
    assert done.error is None
    assert (done.output_tokens, done.cached_tokens, done.finish_reason) == (5, 2, "length")
    assert len(done.chunk_times) == 5, "the closing event carries no token"
    assert done.begun.is_set()
    assert done.started <= done.chunk_times[0] <= done.chunk_times[-1] <= done.ended
    assert done.tpot_s == pytest.approx(sum(done.gaps_s) / 4)


@pytest.mark.parametrize(
    ("answer", "model", "message"),
    [
        (cut_short, None, "without [DONE]"),
        (error_in_stream, None, "replica lost"),
        (whole_answer, "other", "HTTP 404"),
    ],
)
async def test_failures_are_recorded(
    serve: Callable[..., Awaitable[str]], answer: object, model: str | None, message: str
) -> None:
    async with CompletionClient(await serve(answer), model=model) as client:
        done = await client.complete([1], max_tokens=2)
    assert done.error is not None
    assert message in done.error


async def test_an_open_loop_counts_every_request(serve: Callable[..., Awaitable[str]]) -> None:
    items = [WorkItem(arrival_s=0.001 * number, prompt=[1, 2, 3], output_tokens=3) for number in range(20)]
    async with CompletionClient(await serve(whole_answer)) as client:
        result = await run_open_loop(client, items)
    assert len(result.served) == 20
    assert result.errors == []
    assert result.seconds > 0


async def test_streams_go_on_while_prompts_come_and_go(serve: Callable[..., Awaitable[str]]) -> None:
    load = MixedLoad(
        streams=2,
        stream_prompt_tokens=4,
        stream_tokens=50,
        prompt_tokens=9,
        prompt_output_tokens=2,
        rate=100.0,
        outstanding=2,
        seconds=0.3,
        seed=0,
    )
    async with CompletionClient(await serve(whole_answer)) as client:
        results = await run_mixed(client, load)
    assert all(result.gaps_s and result.failed == 0 for result in results.values())
    assert results[Phase.QUIET].prefill_tokens_per_s is None
    assert results[Phase.SATURATED].prefill_tokens_per_s is not None
    assert len(results[Phase.SATURATED].ttfts_s) > 2


async def test_a_failing_stream_ends_the_measurement(serve: Callable[..., Awaitable[str]]) -> None:
    async def fail(write: Write, body: dict[str, object]) -> None:
        if body["max_tokens"] == 50:
            await error_in_stream(write, body)

    async with CompletionClient(await serve(fail)) as client:
        with pytest.raises(RuntimeError, match="replica lost"):
            async with background_streams(client, random.Random(0), streams=1, prompt_tokens=4, stream_tokens=50):
                await asyncio.Event().wait()


def test_an_slo_bounds_the_first_token_and_the_slowest_gaps() -> None:
    slo = Slo(ttft_s=1.0, itl_s=0.1)

    def done(*times: float, error: str | None = None) -> Completion:
        return Completion(1, started=0.0, chunk_times=list(times), error=error)

    assert slo.kept_by(done(0.9, 0.95, 1.04))
    assert slo.kept_by(done(0.9)), "one token has no gap"
    assert not slo.kept_by(done(1.1, 1.15))
    assert not slo.kept_by(done(0.9, 1.2))
    assert not slo.kept_by(done(0.1, error="cut"))
