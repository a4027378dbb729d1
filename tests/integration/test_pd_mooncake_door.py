"""kill -9 of what lets decode take pages by mooncake: prefill's replica opens it again, and decode's hears where."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from pathlib import Path

import pytest
from transformers import LlamaConfig

from cluster.worker import TransferOptions
from engine.config import EngineConfig
from protocol.membership import ReplicaRole
from tests.integration.worker_cluster import ReplicaSpec, WorkerCluster, worker_cluster
from tests.unit.tiny_models import SIZES, save_random_model
from tests.unit.tiny_tokenizers import byte_level_backend
from transfer.mooncake.door import MooncakeDoor
from transfer.mooncake.library import import_failure

try:
    import mooncake.engine  # noqa: F401
except ImportError as error:
    pytest.skip(import_failure(str(error)), allow_module_level=True)

pytestmark = pytest.mark.integration

ENGINE = EngineConfig(max_total_tokens=4096, chunked_prefill_size=64)
SAMPLING = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_random_model(LlamaConfig(**{**SIZES, "vocab_size": 400}, num_key_value_heads=2), tmp_path)
    byte_level_backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<|im_end|>"}')
    return tmp_path


async def generate(cluster: WorkerCluster, first_token: int) -> list[int]:
    """Of a prompt that nobody has cached unless it had the same first token."""
    prompt = [first_token, *range(3, 103)]
    answer = await cluster.generate({"input_ids": prompt, "sampling_params": SAMPLING})
    tokens: list[int] = answer["output_ids"]
    return tokens


async def test_a_killed_door_opens_again_and_peers_come_back_to_it(folder: Path) -> None:
    by_mooncake = TransferOptions(transport="mooncake")
    roles = (ReplicaRole.PREFILL, ReplicaRole.DECODE)
    pd = [ReplicaSpec(role=role, engine=ENGINE, transfer=by_mooncake) for role in roles]
    async with worker_cluster(folder, pd) as cluster:
        outputs = [await generate(cluster, 110)]
        before = await cluster.copies_by_transport()
        assert list(before) == ["mooncake"]
        (door,) = cluster.workers[0]._pages.doors
        assert isinstance(door, MooncakeDoor)
        os.kill(door.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            for first_token in itertools.cycle(range(111, 400)):
                outputs.append(await generate(cluster, first_token))
                if (copies := await cluster.copies_by_transport())["mooncake"] > before["mooncake"]:
                    break
        assert copies.get("tcp"), "pages went another way meanwhile"
        await cluster.assert_idle()
    async with worker_cluster(folder, [ReplicaSpec(role=ReplicaRole.AGGREGATED, engine=ENGINE)]) as cluster:
        assert outputs[:2] == [await generate(cluster, 110), await generate(cluster, 111)]
        assert outputs[-1] == await generate(cluster, first_token)
