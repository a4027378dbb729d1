"""A replica as a Serve deployment: one Ray actor around one `ReplicaWorker`.

Lifecycle: the constructor loads the model and opens the ports, then the replica announces itself to the directory.
Serve checks its health, and awaits `__del__` when it is to go: it stops taking rooms, says so, finishes what it has or
gives it back to the routers, and leaves. Requests never come by a Serve handle: routers speak to the worker's own port.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.config import ClusterConfig
from cluster.directory_handle import DirectoryHandle
from cluster.membership import Announcer
from cluster.metrics_export import MetricsExporter
from cluster.model_folder import model_folder
from cluster.node import node_address
from cluster.replica_readings import ReplicaReadings
from cluster.serve_logs import log_where_serve_does
from protocol.membership import ReplicaRole

if TYPE_CHECKING:
    from cluster.worker import ReplicaWorker, WorkerConfig

_THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_LAST_WORDS_S = 1.0  # of the shutdown budget, to sign off and close the ports


class Replica:
    """Serve deployment of one pool; its role only says which pool routers count it to."""

    async def __init__(  # type: ignore[misc]  # Serve awaits a constructor that is a coroutine
        self, config: ClusterConfig, role: ReplicaRole, secret: bytes, directory: DeploymentHandle[Any]
    ) -> None:
        log_where_serve_does()
        section = config.pools[role.value]
        self._hang_timeout_s = section.hang_timeout_s
        self._drain_s = max(0.0, section.graceful_shutdown_timeout_s - _LAST_WORDS_S)
        self._worker = await asyncio.to_thread(_load, config, role, secret)
        await self._worker.start()
        self._announcer = Announcer(
            DirectoryHandle(directory),
            member=lambda: self._worker.member,
            state=self._worker.state,
            heartbeat_s=config.membership.heartbeat_s,
        )
        self._announcer.start()
        readings = ReplicaReadings(self._worker.reporter)
        self._exporter = MetricsExporter(
            readings.collect, labels={"pool": role.value, "replica": self._worker.config.replica_id}
        )
        self._exporter.start()

    def check_health(self) -> None:
        """Raises `WorkerUnhealthy` when the engine thread has died or hangs; Serve then replaces this replica."""
        self._worker.check(hang_timeout_s=self._hang_timeout_s)

    async def __del__(self) -> None:
        if not hasattr(self, "_exporter"):
            return  # the constructor failed
        draining = asyncio.ensure_future(self._worker.drain(timeout_s=self._drain_s))
        await asyncio.sleep(0)  # it has begun, and `member` says so
        self._announcer.announce_now()
        with contextlib.suppress(TimeoutError):  # of an engine thread that does not answer any more
            await asyncio.wait_for(draining, self._drain_s)
        await self._announcer.stop()
        await self._exporter.stop()
        await self._worker.stop()


def _load(config: ClusterConfig, role: ReplicaRole, secret: bytes) -> ReplicaWorker:
    # Here, before torch is imported, and not in a runtime environment of the actor's: for one of those Ray starts a
    # process that imports all of Ray only to start the worker.
    os.environ |= dict.fromkeys(_THREAD_COUNTS, str(config.pools[role.value].num_threads))
    gc.disable()  # all that is made now stays: to look through it again and again is a tenth of the time
    try:
        from cluster.worker import ReplicaWorker  # here, because it imports torch and the driver need not

        return ReplicaWorker(_worker_config(config, role, secret))
    finally:
        gc.freeze()  # a full collection that walks all of torch would stop a decode step for as long as it takes
        gc.enable()


def _worker_config(config: ClusterConfig, role: ReplicaRole, secret: bytes) -> WorkerConfig:
    from cluster.worker import TransferOptions, WorkerConfig
    from engine.config import EngineConfig
    from engine.grammar.limits import GrammarLimits

    section = config.pools[role.value]
    assert section.num_threads != "auto", "resolved by build_app"
    host = node_address()
    return WorkerConfig(
        replica_id=serve.get_replica_context().replica_id.unique_id,
        role=role,
        model_path=model_folder(config.model.path),
        engine=EngineConfig(
            page_size=config.page_size_of(role.value),
            max_total_tokens=section.max_total_tokens,
            max_running_requests=section.max_running_requests,
            chunked_prefill_size=section.chunked_prefill_size,
            enable_prefix_cache=section.enable_prefix_cache,
            decode_headroom_tokens=section.decode_headroom_tokens,
        ),
        secret=secret,
        dtype=config.model.dtype,
        device=config.model.device,
        num_threads=section.num_threads,
        grammars=GrammarLimits(
            compile_threads=config.grammars.compile_threads,
            compile_timeout_s=config.grammars.compile_timeout_s,
            max_compiled_bytes=config.grammars.max_compiled_mb << 20,
            cache_bytes=config.grammars.cache_mb << 20,
            follow_budget_s=config.grammars.follow_budget_s,
            mask_timeout_s=config.grammars.mask_timeout_s,
        ),
        bind_host=host,
        advertise_host=host,
        transfer=TransferOptions(
            transport=config.transfer.transport,
            wire_dtype=config.transfer.wire_dtype,
            checksum=config.transfer.checksum,
            num_threads=config.transfer.num_threads,
            ib_device=config.transfer.ib_device,
            folder=None if config.transfer.folder is None else Path(config.transfer.folder),
            folder_max_bytes=config.transfer.folder_max_mb << 20,
        ),
    )
