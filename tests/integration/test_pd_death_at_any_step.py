"""kill -9 and SIGSTOP of either end before each of its steps: real halves, links, transfers and router, a tiny model.

The other end goes through all of it in one life. Whatever happens, the client gets the very tokens it would have got,
and the books of whoever lives balance with nothing held.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import LlamaConfig

from cluster.worker import ReplicaWorker, TransferOptions, WorkerConfig
from engine.config import EngineConfig
from protocol.link import LinkTimings
from protocol.membership import ReplicaRole
from protocol.rooms import FailureCode
from router.app import build_asgi
from router.config import RouterConfig
from tests.integration.worker_cluster import MODEL_NAME, SECRET, until_whole
from tests.integration.worker_processes import (
    Nursery,
    ReplicaOrder,
    ReplicaProcess,
    find_silence_sooner,
    wait_for_groups,
)
from tests.unit.mooncake_library import needs_library
from tests.unit.tiny_models import SIZES, save_random_model
from tests.unit.tiny_tokenizers import byte_level_backend
from transfer.jobs import PageCopy
from transfer.landing import Landing
from transfer.transport import TransferTimings

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

PROMPT = [7 * step % 300 + 3 for step in range(100)]
BODY = {"input_ids": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True}}
OTHER = {ReplicaRole.PREFILL: ReplicaRole.DECODE, ReplicaRole.DECODE: ReplicaRole.PREFILL}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_random_model(LlamaConfig(**{**SIZES, "vocab_size": 400}, num_key_value_heads=2), folder)
    byte_level_backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<|im_end|>"}')
    return folder


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(autouse=True)
def other_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    for timings, change in ((LinkTimings, find_silence_sooner), (TransferTimings, wait_for_groups)):
        defaults = dict(timings.__init__.__kwdefaults__)
        change(defaults)
        monkeypatch.setattr(timings.__init__, "__kwdefaults__", defaults)


class Pair:
    """One replica here, which stays, one elsewhere, which may not, and a router."""

    def __init__(
        self, nursery: Nursery, folder: Path, mortal: ReplicaRole, transport: Any, shared: Path | None = None
    ) -> None:
        self._nursery = nursery
        self._folder = folder
        self._mortal = mortal
        self._transport = transport
        self._shared = shared
        self.survivor = ReplicaWorker(
            WorkerConfig(
                replica_id="survivor",
                role=OTHER[mortal],
                model_path=folder,
                engine=EngineConfig(max_total_tokens=1024, chunked_prefill_size=32),
                secret=SECRET,
                dtype="float32",
                transfer=TransferOptions(transport=transport, folder=shared),
            )
        )
        config = RouterConfig(model_name=MODEL_NAME, tokenizer_folder=folder, context_length=256, secret=SECRET)
        self._app = build_asgi(config)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Pair]:
        await self.survivor.start()
        try:
            async with (
                self._app.router.lifespan_context(self._app),
                httpx.AsyncClient(transport=httpx.ASGITransport(app=self._app), base_url="http://router") as client,
            ):
                self._client = client
                yield self
        finally:
            await self.survivor.stop()

    @contextlib.asynccontextmanager
    async def other(self, *, step: int, by: int) -> AsyncIterator[ReplicaProcess]:
        """The mortal one, for as long as the context lasts at most."""
        shared = "" if self._shared is None else str(self._shared)
        order = ReplicaOrder(self._mortal, str(self._folder), self._transport, shared, step, by)
        process = await asyncio.to_thread(self._nursery.fork, order)
        try:
            self._app.state.members.update([self.survivor.member, process.member])
            await until_whole(self._client)
            yield process
        finally:
            process.close()

    async def generate(self) -> list[int]:
        async with asyncio.timeout(60):
            response = await self._client.post("/generate", json=BODY, timeout=60)
        assert response.status_code == 200, response.text
        tokens: list[int] = response.json()["output_ids"]
        return tokens

    async def flush(self) -> None:
        """Have no pages of prompts left in the survivor's cache."""
        await asyncio.wrap_future(self.survivor._thread.call(self.survivor._engine.flush_cache))

    async def settle(self) -> None:
        """The survivor soon has no room, and books that balance."""
        async with asyncio.timeout(30):
            while not (await self.survivor.is_idle() and (await self.survivor.audit()).idle):
                pass  # each question waits for a pass of the engine thread


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("mortal", [ReplicaRole.PREFILL, ReplicaRole.DECODE])
async def test_kill_9_before_any_step(folder: Path, nursery: Nursery, mortal: ReplicaRole, transport: str) -> None:
    async with Pair(nursery, folder, mortal, transport).running() as pair:
        async with pair.other(step=0, by=0):
            expected = await pair.generate()
            assert len(expected) == 5
        for step in itertools.count(1):
            async with pair.other(step=step, by=signal.SIGKILL) as other:
                assert await pair.generate() == expected, f"killed before step {step}"
                await pair.settle()
                if await asyncio.to_thread(other.settles):
                    break  # there was no such step any more
                assert await asyncio.to_thread(other.dies)
        assert step > 6


@pytest.mark.parametrize(
    ("transport", "mortal", "steps"),
    [
        ("disk", ReplicaRole.PREFILL, (2, 4, 5, 7)),
        ("disk", ReplicaRole.DECODE, (3, 5, 7)),
        pytest.param("mooncake", ReplicaRole.PREFILL, (4, 5, 7), marks=needs_library),
        pytest.param("mooncake", ReplicaRole.DECODE, (4, 5, 7), marks=needs_library),
        ("gloo", ReplicaRole.PREFILL, (5, 7)),
        ("gloo", ReplicaRole.DECODE, (4, 6)),
    ],
)
async def test_kill_9_before_some_steps(
    folder: Path, nursery: Nursery, tmp_path: Path, transport: str, mortal: ReplicaRole, steps: tuple[int, ...]
) -> None:
    """Of transports that take seconds to make, or files: the steps around the pages."""
    async with Pair(nursery, folder, mortal, transport, tmp_path if transport == "disk" else None).running() as pair:
        async with pair.other(step=0, by=0):
            expected = await pair.generate()
        if mortal is ReplicaRole.PREFILL:
            assert list(pair.survivor._decode.traffic.by_transport) == [transport]
        for step in steps:
            async with pair.other(step=step, by=signal.SIGKILL) as other:
                assert await pair.generate() == expected, f"killed before step {step}"
                await pair.settle()
                assert not await asyncio.to_thread(other.settles), f"there is no step {step}"
                assert await asyncio.to_thread(other.dies)


@pytest.mark.parametrize("mortal", [ReplicaRole.PREFILL, ReplicaRole.DECODE])
async def test_sigstop_before_a_step(folder: Path, nursery: Nursery, mortal: ReplicaRole) -> None:
    async with Pair(nursery, folder, mortal, "tcp").running() as pair:
        async with pair.other(step=0, by=0):
            expected = await pair.generate()
        stopped = 0
        for step in (2, 4, 6):
            async with pair.other(step=step, by=signal.SIGSTOP) as other:
                assert await pair.generate() == expected, f"stopped before step {step}"
                await pair.settle()
                stopped += other.is_stopped
                other.resume()  # it finds its links gone, and gives up what it held
                assert await asyncio.to_thread(other.settles)
        assert stopped == 3


@pytest.mark.parametrize("wrong", [frozenset({"shm"}), frozenset({"shm", "tcp"})], ids=["one way", "every way"])
async def test_wrong_pages_are_taken_or_computed_again(
    folder: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch, wrong: frozenset[str]
) -> None:
    """The client notices nothing."""
    changing = False
    landed = Landing.landed

    def change(self: Landing, copy: PageCopy, transport: str, count: int) -> None:
        if changing and transport in wrong:
            self.view[copy.job.target_pages[copy.done_pages] * self.page_bytes] ^= 1
        landed(self, copy, transport, count)

    monkeypatch.setattr(Landing, "landed", change)
    async with (
        Pair(nursery, folder, ReplicaRole.PREFILL, "auto").running() as pair,
        pair.other(step=0, by=0) as other,
    ):
        expected = await pair.generate()
        await pair.flush()
        changing = True
        assert await pair.generate() == expected
        await pair.settle()
        assert await asyncio.to_thread(other.settles)
        if "tcp" not in wrong:
            assert "tcp" in pair.survivor._decode.traffic.by_transport, "they were taken another way"
        failures = pair.survivor._decode.counters.failures[FailureCode.TRANSFER_FAILED]
        assert failures == ("tcp" in wrong), "it is computed again when no way is left, and only then"
