"""The router behind a real HTTP server: the official client, connections that break, sockets that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
import uvicorn
from router_harness import TEXT, TEXT_IDS, WAIT_S, RouterHarness, running_router, until

from protocol.membership import ReplicaRole
from protocol.rooms import AbortReason, OpenGenerate, OpenPrefill

_SMALL_BUFFER = 4096
"""Bytes of a socket's buffer; the kernel makes at least twice that of it."""


@contextlib.asynccontextmanager
async def serving(folder: Path, **settings: float) -> AsyncIterator[tuple[RouterHarness, int]]:
    """A router on a free port of the loopback."""
    async with running_router(folder, **settings) as router:
        config = uvicorn.Config(router.app, lifespan="off", log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL_BUFFER)  # connections inherit it
            task = asyncio.create_task(server.serve(sockets=[listener]))
            await until(lambda: server.started)
            yield router, listener.getsockname()[1]
            server.should_exit = True
            await asyncio.wait_for(task, WAIT_S)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[RouterHarness, int]]:
    async with serving(tmp_path, failover_wait_s=0.1) as pair:
        yield pair


def client(port: int) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=WAIT_S)


def request(body: dict[str, object]) -> bytes:
    """The bytes of a completion request."""
    data = json.dumps(body).encode()
    return f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


async def test_openai_client(served: tuple[RouterHarness, int]) -> None:
    router, port = served
    await router.pair(automatic=True)
    messages = [{"role": "user", "content": "a fox?"}]
    async with client(port) as api:
        assert [model.id async for model in await api.models.list()] == ["tiny"]
        chat = await api.chat.completions.create(model="tiny", messages=messages, max_tokens=100)
        assert chat.choices[0].message.content == TEXT
        assert chat.usage is not None
        assert chat.usage.completion_tokens == len(TEXT_IDS) + 1
        assert chat.usage.prompt_tokens_details is not None
        assert chat.usage.prompt_tokens_details.cached_tokens == 3
        # what a client sends back as history is what it was given
        again = [*messages, chat.choices[0].message, {"role": "user", "content": "and?"}]
        assert (await api.chat.completions.create(model="tiny", messages=again)).choices[0].finish_reason == "stop"

        text, usage = "", None
        async for chunk in await api.chat.completions.create(
            model="tiny",
            messages=messages,
            max_completion_tokens=100,
            stream=True,
            stream_options={"include_usage": True},
        ):
            usage = chunk.usage
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        assert (text, usage) == (TEXT, chat.usage)

        completion = await api.completions.create(model="tiny", prompt="a fox", max_tokens=5, logprobs=1)
        assert completion.choices[0].finish_reason == "length"
        pieces = [
            chunk.choices[0].text
            async for chunk in await api.completions.create(model="tiny", prompt="a fox", max_tokens=5, stream=True)
        ]
        assert "".join(pieces) == completion.choices[0].text


async def test_openai_client_gets_its_exceptions(served: tuple[RouterHarness, int]) -> None:
    router, port = served
    async with client(port) as api:
        with pytest.raises(openai.InternalServerError, match="no replica is up"):
            await api.completions.create(model="tiny", prompt="a")
        await router.pair(automatic=True)
        with pytest.raises(openai.NotFoundError, match="gpt-17"):
            await api.completions.create(model="gpt-17", prompt="a")
        with pytest.raises(openai.BadRequestError, match="context length is 256") as caught:
            await api.completions.create(model="tiny", prompt=[5] * 300)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


async def test_error_after_the_first_token_is_raised_by_the_openai_client(served: tuple[RouterHarness, int]) -> None:
    router, port = served
    replica = await router.add("both", ReplicaRole.AGGREGATED)
    async with client(port) as api:
        asking = asyncio.create_task(
            api.with_options(default_headers={"X-Request-Timeout": "0.3"}).completions.create(
                model="tiny", prompt="a", stream=True
            )
        )
        room = (await replica.opened(OpenGenerate)).room
        replica.send(room, 0, TEXT_IDS[0])
        stream = await asking
        assert (await anext(stream)).choices[0].text == "the"
        with pytest.raises(openai.APIError, match=r"not finished within its 0\.3 s"):
            await anext(stream)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_closed_connection_aborts_at_once(served: tuple[RouterHarness, int], stream: bool) -> None:
    router, port = served
    prefill, decode = await router.pair()
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request({"prompt": "a", "stream": stream}))
    room = (await prefill.opened(OpenPrefill)).room
    writer.close()
    assert (await prefill.aborted(room)).reason is AbortReason.CLIENT_GONE
    await decode.aborted(room)
    await router.idle()


async def test_a_socket_that_nobody_reads_is_dropped_and_slows_nobody(tmp_path: Path) -> None:
    async with serving(tmp_path, context_length=100_000, max_buffered_tokens=64) as (router, port):
        replica = await router.add("both", ReplicaRole.AGGREGATED)
        with socket.socket() as unread:
            unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
            unread.connect(("127.0.0.1", port))
            unread.sendall(request({"prompt": "a", "stream": True, "max_tokens": 90_000}))
            room = (await replica.opened(OpenGenerate)).room
            for position in range(90_000):  # until every buffer in between is full
                replica.send(room, position, TEXT_IDS[0])
                await asyncio.sleep(0)
                if replica.aborts:
                    break
            assert replica.aborts[0].room == room
            replica.automatic = True
            async with client(port) as api:
                completion = await api.completions.create(model="tiny", prompt="a", max_tokens=100)
            assert completion.choices[0].text == TEXT
            await router.idle()
            assert router.metrics.overflows.total == 1
            assert router.metrics.aborts.values.keys() == {"client_gone"}


async def test_half_a_request_is_nobodys_load(served: tuple[RouterHarness, int]) -> None:
    router, port = served
    await router.pair(automatic=True)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    async with client(port) as api:
        assert (await api.completions.create(model="tiny", prompt="a", max_tokens=100)).choices[0].text == TEXT
    writer.close()
    await until(lambda: router.metrics.requests["499"] == 1)
    await router.idle()
