"""Which doors a replica opens to its pool, by the name of its transport: the serving side of `choice.py`.

Shared memory and TCP need none, the page server has them. What a door needs is imported only where it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transfer.choice import TransportName, ways_of
from transfer.disk.packs import SpoolLimits
from transfer.disk.spool import Spool
from transfer.dist.orders import BackendName
from transfer.door import Door
from transfer.memory import SharedMemory


@dataclass(frozen=True, kw_only=True)
class DoorParts:
    """What a replica gives each of its doors."""

    memory: SharedMemory
    """Must outlive the doors."""
    page_bytes: int
    num_pages: int
    replica_id: str
    boot: int
    secret: bytes
    host: str
    """That peers reach this machine by."""
    bind_host: str
    ib_device: str = ""
    """The RDMA devices of `mooncake`; empty for its TCP."""
    folder: Path | None = None
    """That `disk` shares with the peers."""
    folder_max_bytes: int = SpoolLimits.max_bytes
    on_moved: Callable[[], None] = lambda: None
    """Called, in a thread of its own, by a door that has another address from now on."""


def open_doors(name: TransportName, parts: DoorParts) -> list[Door]:
    """A door for each way of `name` that needs one; they are the caller's. Raises `ValueError` for one that cannot be
    opened."""
    return [_OPENERS[way](parts) for way in ways_of(name, folder=parts.folder) if way in _OPENERS]


def _disk(parts: DoorParts) -> Door:
    assert parts.folder is not None, "checked by `ways_of`"
    return Spool(
        folder=parts.folder,
        view=parts.memory.view,
        page_bytes=parts.page_bytes,
        replica_id=parts.replica_id,
        boot=parts.boot,
        limits=SpoolLimits(max_bytes=parts.folder_max_bytes),
    )


def _mooncake(parts: DoorParts) -> Door:
    from transfer.mooncake.door import MooncakeDoor

    return MooncakeDoor(memory=parts.memory, host=parts.host, ib_device=parts.ib_device, on_moved=parts.on_moved)


def _group(backend: BackendName, parts: DoorParts) -> Door:
    from transfer.dist.door import GroupDoor

    return GroupDoor(
        backend,
        memory=parts.memory,
        page_bytes=parts.page_bytes,
        num_pages=parts.num_pages,
        host=parts.host,
        bind_host=parts.bind_host,
        boot=parts.boot,
        secret=parts.secret,
    )


def _nccl(parts: DoorParts) -> Door:
    from transfer.cuda.library import check_driver

    check_driver("nccl", "gloo or auto")  # or helpers would be started in vain for ever, and all go by TCP
    return _group("nccl", parts)


_OPENERS: Mapping[str, Callable[[DoorParts], Door]] = {
    "disk": _disk,
    "mooncake": _mooncake,
    "gloo": partial(_group, "gloo"),
    "nccl": _nccl,
}
