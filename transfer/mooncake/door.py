"""The serving end: a process that lets peers read the pool through mooncake-transfer-engine."""

from __future__ import annotations

import secrets

import msgspec

from transfer.memory import SharedMemory
from transfer.mooncake.messages import IDENTITY_BYTES, DoorAddress
from transfer.mooncake.process import EngineProcess

_START_S = 60.0


class MooncakeDoor:
    """Implements `door.Door`: opened by the constructor, which waits until the library runs; closed before `memory`.

    `host` is the IPv4 address or name that peers reach this machine by. `ib_device` names the RDMA devices to use, with
    commas between them; empty means TCP. Raises `MooncakeUnavailable` where the library or the device is missing, and
    `ValueError` for an IPv6 host. A door whose process dies stays shut: peers then take the next transport.
    """

    name = "mooncake"

    def __init__(self, *, memory: SharedMemory, host: str, ib_device: str = "") -> None:
        if ":" in host:
            raise ValueError(f"host {host!r} is an IPv6 address; transport mooncake needs an IPv4 address or a name")
        identity = secrets.token_hex(IDENTITY_BYTES)
        self._process = EngineProcess(
            memory_fd=memory.fd,
            memory_bytes=memory.nbytes,
            host=host,
            ib_device=ib_device,
            serves=True,
            identity=identity,
        )
        try:
            ready = self._process.wait_ready(timeout_s=_START_S)
        except Exception:
            self.close(timeout_s=_START_S)
            raise
        self._address = DoorAddress(
            protocol="rdma" if ib_device else "tcp",
            session=ready.session,
            base=ready.base,
            identity_at=ready.identity_at,
            identity=identity,
        )

    @property
    def pid(self) -> int:
        """Of the process that serves."""
        return self._process.pid

    def address(self) -> str:
        return msgspec.json.encode(self._address).decode()

    def close(self, *, timeout_s: float) -> None:
        self._process.kill(timeout_s=timeout_s)
        self._process.sock.close()
