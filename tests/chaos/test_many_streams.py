"""Two prefill and two decode replicas under many streams at once, and clients that behave badly."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from urllib.parse import urlsplit

import aiohttp
import pytest
from live_cluster import LiveCluster
from streaming_client import stream_completion

pytestmark = [pytest.mark.chaos, pytest.mark.ray]

SETTINGS = {
    "model": {"path": "embedded"},
    "prefill": {"num_replicas": 2},
    "decode": {"num_replicas": 2},
    "router": {"send_timeout_s": 5.0},
}
STREAMS = 200


async def test_streams_of_which_a_fifth_hang_up(cluster: LiveCluster, session: aiohttp.ClientSession) -> None:
    rng = random.Random("many")
    prompts = [rng.choices(range(1_000, 20_000), k=rng.choice([8, 40, 120, 300])) for _ in range(STREAMS)]
    lengths = [rng.choice([6, 16, 40]) for _ in range(STREAMS)]
    hang_ups = [rng.randint(1, length - 2) if number % 5 == 0 else None for number, length in enumerate(lengths)]
    outcomes = await asyncio.gather(
        *(
            stream_completion(session, cluster.url, prompt, max_tokens=length, hang_up_after=hang_up)
            for prompt, length, hang_up in zip(prompts, lengths, hang_ups, strict=True)
        )
    )
    for outcome, length, hang_up in zip(outcomes, lengths, hang_ups, strict=True):
        assert (outcome.broken, outcome.error) == (None, None)
        if hang_up is None:
            assert (outcome.finish, outcome.completion_tokens) == ("length", length)
    await asyncio.to_thread(cluster.wait_balanced)
    used = {replica for replica, state in (await asyncio.to_thread(cluster.replica_states)).items() if _worked(state)}
    assert len(used) == 4, "every replica had a part in it"


async def test_a_client_that_never_reads_slows_nobody(cluster: LiveCluster, session: aiohttp.ClientSession) -> None:
    """It asks for far more than the buffers on the way hold; others are served meanwhile, and its pages come back."""
    finished_before = _finished(cluster)
    with _silent_client(cluster.url, choices=4, max_tokens=6_000):
        await asyncio.to_thread(cluster.wait, lambda: _open_rooms(cluster) > 0, "the silent client's rooms", 60.0)
        rng = random.Random("beside")
        prompts = [rng.choices(range(1_000, 20_000), k=30) for _ in range(8)]
        streams = (stream_completion(session, cluster.url, prompt, max_tokens=16) for prompt in prompts)
        assert {outcome.finish for outcome in await asyncio.gather(*streams)} == {"length"}
        await asyncio.to_thread(cluster.wait_balanced)
    assert _finished(cluster) - finished_before == len(prompts), "the silent client's were cut off"


async def test_a_client_that_leaves_before_the_first_token(
    cluster: LiveCluster, session: aiohttp.ClientSession
) -> None:
    """It goes while its long prompt is computed or waits; nothing of it is left."""
    rng = random.Random("leaving")
    prompts = [rng.choices(range(1_000, 20_000), k=1_500) for _ in range(6)]
    streams = [asyncio.create_task(stream_completion(session, cluster.url, prompt, max_tokens=4)) for prompt in prompts]
    await asyncio.to_thread(cluster.wait, lambda: _open_rooms(cluster) == len(prompts), "all rooms to be open", 60.0)
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    await asyncio.to_thread(cluster.wait_balanced)


def _silent_client(url: str, *, choices: int, max_tokens: int) -> socket.socket:
    """A connection that has asked for a long stream and reads none of it. Each event repeats all there is so far, which
    fills every buffer on the way, so that a router gives it up (after five seconds) long before the last token."""
    sampling = {"n": choices, "max_new_tokens": max_tokens, "ignore_eos": True}
    asked = {"return_logprob": True, "top_logprobs_num": 20, "stream": True}
    body = json.dumps({"input_ids": [1_000, 2_000], "sampling_params": sampling, **asked})
    parts = urlsplit(url)
    silent = socket.socket()
    silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    silent.connect((parts.hostname, parts.port))
    head = f"POST /generate HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    silent.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return silent


def _open_rooms(cluster: LiveCluster) -> int:
    return len(cluster.state()["rooms"])


def _finished(cluster: LiveCluster) -> int:
    """Sequences that the router has seen to their own end."""
    finished: int = cluster.state()["metrics"]["router_sequences"].get("finished", 0)
    return finished


def _worked(state: dict[str, dict[str, dict[str, int]]]) -> bool:
    return state["prefill"]["counters"]["opened"] + state["decode"]["counters"]["opened"] > 0
