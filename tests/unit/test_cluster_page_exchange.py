"""The end of a replica's pool: in time, or with an error, and never under somebody's hands."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from cluster.page_exchange import PageExchange
from cluster.worker_config import WorkerConfig
from engine.config import EngineConfig
from engine.kv_spec import KVCacheSpec
from protocol.membership import ReplicaRole

WAIT_S = 30


def test_memory_that_the_system_is_still_giving_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    config = WorkerConfig(
        replica_id="prefill-0",
        role=ReplicaRole.PREFILL,
        model_path=Path("model"),
        engine=EngineConfig(max_total_tokens=64),
        secret=b"secret",
    )
    spec = KVCacheSpec(num_layers=1, num_kv_heads=1, head_dim=8, page_size=16, dtype=torch.float32)
    asked, answer = threading.Event(), threading.Event()

    def hang(start: int, nbytes: int) -> None:
        asked.set()
        assert answer.wait(WAIT_S)

    monkeypatch.setattr("cluster.page_exchange._PREFAULT_DELAY_S", 0.0)
    monkeypatch.setattr("cluster.page_exchange._CLOSE_S", 0.1)
    pages = PageExchange(config, spec, model_id="model", boot=1)
    monkeypatch.setattr(pages.memory, "populate", hang)
    pages.open(on_moved=lambda: None)
    pages.prefault()
    assert asked.wait(WAIT_S)
    with pytest.raises(TimeoutError, match="KV pool"):
        pages.close()
    assert pages.memory.view[0] == 0
    answer.set()
    pages.close()
    with pytest.raises(ValueError, match="released"):
        pages.memory.view[0]
