"""Lets peers on this host map a pool in GPU memory: the serving end of `CudaTransport`. It needs no thread: the driver
serves."""

from __future__ import annotations

import msgspec

from protocol.handshake import RegionTicket
from transfer.cuda.library import HANDLE_BYTES
from transfer.cuda.memory import DeviceMemory
from transfer.memory import host_id


class DoorAddress(msgspec.Struct, frozen=True):
    """What a ticket says of a pool in GPU memory."""

    gpu: str
    """The UUID of the GPU that holds it."""
    handle: str
    """Its IPC handle, in hexadecimal digits."""


class CudaDoor:
    """Implements `door.Door`. `memory` stays its owner's."""

    name = "cuda"

    def __init__(self, memory: DeviceMemory) -> None:
        self._address = DoorAddress(gpu=memory.cuda.gpu, handle=memory.handle().hex())

    def address(self) -> str:
        return msgspec.json.encode(self._address).decode()

    def close(self, *, timeout_s: float) -> None:
        """Nothing to be done: who has mapped the memory keeps it until it is detached there."""


def read_address(ticket: RegionTicket) -> DoorAddress | None:
    """Where a peer's pool is; None when it has no such door, or what is said of it makes no sense."""
    try:
        address = msgspec.json.decode(ticket.doors.get(CudaDoor.name, ""), type=DoorAddress)
        return address if len(bytes.fromhex(address.handle)) == HANDLE_BYTES else None
    except ValueError:  # a ticket from a replica of another version is no reason to fail
        return None


def device_ticket(door: CudaDoor, *, num_pages: int, page_bytes: int, layout: str) -> RegionTicket:
    """The ticket of a pool that can only be reached by `door`."""
    return RegionTicket(
        num_pages=num_pages,
        page_bytes=page_bytes,
        layout=layout,
        host_id=host_id(),
        shm_socket="",
        tcp_host="",
        tcp_port=0,
        doors={door.name: door.address()},
    )
