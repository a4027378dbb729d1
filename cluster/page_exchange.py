"""The memory of a replica's KV pool, and all that brings pages out of it to other replicas and into it from them.

Lifecycle: the constructor makes the memory, which the system gives page by page at first touch; `open` lets peers in
and makes the fetcher; `prefault` takes the memory from the system behind the start; `close` ends all of it, once
nobody fetches and no engine uses the memory any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from cluster.offer_checksums import OfferChecksums, pool_shape
from cluster.worker_config import WorkerConfig
from engine.kv_spec import KVCacheSpec
from protocol.handshake import PoolShape, RegionTicket
from transfer.choice import is_written_by_helpers
from transfer.disk.spool import Spool
from transfer.doors import DoorParts, open_doors
from transfer.fetcher import PageFetcher
from transfer.int8_codec import Int8Codec
from transfer.memory import SharedMemory
from transfer.prefault import Prefault
from transfer.server import PageServer

_CLOSE_S = 10.0
"""For each of the doors to end, and for the memory that is just being taken."""
_PREFAULT_DELAY_S = 5.0
"""By then the other replicas that start on a machine are there."""


class _Pool(TypedDict):
    """What server and fetcher must be told alike."""

    memory: SharedMemory
    page_bytes: int
    layout: str
    shape: PoolShape
    codec: Int8Codec | None
    secret: bytes


class PageExchange:
    """Of the replica of `config` in its life `boot`, whose model `model_id` has KV as `spec` says."""

    def __init__(self, config: WorkerConfig, spec: KVCacheSpec, *, model_id: str, boot: int) -> None:
        self._config = config
        self._page_bytes = spec.page_bytes
        self._layout = spec.layout_fingerprint(model_id)
        self._shape = pool_shape(spec, model_id)
        self._boot = boot
        self.memory = SharedMemory(
            config.engine.num_pages * spec.page_bytes,
            prefault=False,
            shared_writable=bool(config.transfer.ib_device)  # RDMA cannot register what is only to be read
            or is_written_by_helpers(config.transfer.transport),
        )
        self._prefault = Prefault(self.memory, delay_s=_PREFAULT_DELAY_S)

    def open(self, *, on_moved: Callable[[], None]) -> None:
        """Let peers in, and be ready to fetch. `on_moved` is called, in a thread of a door's, when `ticket` has
        changed."""
        config, transfer = self._config, self._config.transfer
        self.doors = open_doors(
            transfer.transport,
            DoorParts(
                memory=self.memory,
                page_bytes=self._page_bytes,
                num_pages=config.engine.num_pages,
                replica_id=config.replica_id,
                boot=self._boot,
                secret=config.secret,
                host=config.advertise_host,
                bind_host=config.bind_host,
                ib_device=transfer.ib_device,
                folder=transfer.folder,
                folder_max_bytes=transfer.folder_max_bytes,
                on_moved=on_moved,
            ),
        )
        pool = _Pool(
            memory=self.memory,
            page_bytes=self._page_bytes,
            layout=self._layout,
            shape=self._shape,
            codec=Int8Codec(self._shape.dtype) if transfer.wire_dtype == "int8" else None,
            secret=config.secret,
        )
        self._server = PageServer(
            **pool,
            num_pages=config.engine.num_pages,
            host=config.advertise_host,
            bind_host=config.bind_host,
            boot=self._boot,
            doors=self.doors,
        )
        self.fetcher = PageFetcher(
            **pool,
            num_threads=transfer.num_threads,
            verify=transfer.checksum,
            transport=transfer.transport,
            ib_device=transfer.ib_device,
            folder=transfer.folder,
        )
        self.checksums = OfferChecksums(
            self.memory.view,
            self._shape,
            page_bytes=self._page_bytes,
            spools=[door for door in self.doors if isinstance(door, Spool)],
            enabled=transfer.checksum,
        )

    def ticket(self) -> RegionTicket:
        """How peers reach the pool at present."""
        return self._server.ticket()

    def prefault(self) -> None:
        """Begin to take the memory from the system."""
        self._prefault.start()

    @property
    def is_alive(self) -> bool:
        """Whether pages can still be given and taken, once `open` was called."""
        return self._server.is_alive and self.fetcher.is_alive

    @property
    def memory_error(self) -> MemoryError | None:
        """What the system refused when the memory was taken, if it did."""
        return self._prefault.error

    def close(self) -> None:
        """End the threads, the ports and the memory. Waits for each; raises `TimeoutError` when one does not end in
        time, and then keeps the memory."""
        self.fetcher.close()
        self._server.close()
        for door in self.doors:
            door.close(timeout_s=_CLOSE_S)
        self._prefault.stop(timeout_s=_CLOSE_S)
        self.memory.close()
