"""Which transports a fetcher uses, by the name in the configuration, and how they are made.

A name stands for the ways that are tried, in order, before a transfer is given up: the one that was asked for, then our
own TCP, which needs nothing but a route. What a transport of a name needs is imported only where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from transfer.disk.folders import check_shared
from transfer.dist.orders import BackendName
from transfer.faults import Faults
from transfer.io_loop import IoLoop
from transfer.landing import Landing
from transfer.memory import SharedMemory
from transfer.shm import ShmTransport
from transfer.tcp import TcpTransport
from transfer.transport import TransferTimings, Transport

if TYPE_CHECKING:
    from transfer.cuda.landing import DeviceLanding
    from transfer.cuda.memory import DeviceMemory

TransportName = Literal["auto", "shm", "tcp", "disk", "mooncake", "gloo", "nccl", "cuda"]

_WAYS: Mapping[TransportName, tuple[str, ...]] = {
    "auto": ("shm", "tcp"),
    "shm": ("shm",),
    "tcp": ("tcp",),
    "mooncake": ("mooncake", "tcp"),
    "gloo": ("gloo", "tcp"),
    "nccl": ("nccl", "tcp"),
    "disk": ("disk",),
}
"""Between pools in the memory of the host."""
_DEVICE_WAYS: Mapping[TransportName, tuple[str, ...]] = {"auto": ("cuda",), "cuda": ("cuda",)}
"""Between pools in the memory of GPUs."""


@dataclass(frozen=True, kw_only=True)
class TransportParts:
    """What a fetcher gives each of its transports."""

    loop: IoLoop
    landing: Landing | DeviceLanding
    """Of the kind that `landing_in` made for our pool."""
    secret: bytes
    num_threads: int
    """That may copy within the host."""
    at_once_bytes: int
    """Copies of no more than that are made by whoever asks for them, within the host, while those threads are idle; or,
    over TCP, asked for, while the loop is."""
    clock: Callable[[], float]
    timings: TransferTimings
    ib_device: str = ""
    """The RDMA devices of `mooncake`; empty for its TCP."""
    folder: Path | None = None
    """That `disk` shares with the peers."""


def ways_of(name: TransportName, *, folder: Path | None = None, on_gpu: bool = False) -> tuple[str, ...]:
    """The ways that `name` stands for, in the order in which they are tried, to a pool in GPU memory or the host's.
    Raises `ValueError` for another name, and when what one of them needs is not there."""
    if name not in get_args(TransportName):
        raise ValueError(f"transport {name!r} is not one of {', '.join(get_args(TransportName))}")
    ways = _DEVICE_WAYS if on_gpu else _WAYS
    if name not in ways:
        here, names = ("GPU memory" if on_gpu else "the host's memory"), ", ".join(ways)
        raise ValueError(f"transport {name!r} cannot fill a KV pool in {here}; set transport to one of {names}")
    if "disk" in ways[name]:
        check_shared(folder)
    return ways[name]


def is_written_by_helpers(name: TransportName) -> bool:
    """Whether processes of ours write into a pool that is filled by `name`, which must then be `shared_writable`."""
    return name in get_args(BackendName)


def landing_in(
    memory: SharedMemory | DeviceMemory, *, page_bytes: int, faults: Faults | None
) -> Landing | DeviceLanding:
    """Where transports bring pages of ours to."""
    if isinstance(memory, SharedMemory):
        fd = memory.fd if memory.shared_writable else None
        return Landing(memory.view, page_bytes=page_bytes, faults=faults, fd=fd)
    from transfer.cuda.landing import DeviceLanding

    return DeviceLanding(memory, page_bytes=page_bytes, faults=faults)


def make_transports(ways: Sequence[str], parts: TransportParts) -> list[Transport]:
    """A transport for each way, in the same order."""
    return [_MAKERS[way](parts) for way in ways]


def _shm(parts: TransportParts) -> Transport:
    return ShmTransport(
        parts.loop,
        _on_host(parts),
        secret=parts.secret,
        num_threads=parts.num_threads,
        at_once_bytes=parts.at_once_bytes,
        clock=parts.clock,
        timings=parts.timings,
    )


def _tcp(parts: TransportParts) -> Transport:
    return TcpTransport(
        parts.loop,
        _on_host(parts),
        secret=parts.secret,
        at_once_bytes=parts.at_once_bytes,
        clock=parts.clock,
        timings=parts.timings,
    )


def _disk(parts: TransportParts) -> Transport:
    from transfer.disk.transport import DiskTransport

    assert parts.folder is not None, "checked by `ways_of`"
    return DiskTransport(
        parts.loop, _on_host(parts), folder=parts.folder, num_threads=parts.num_threads, clock=parts.clock
    )


def _mooncake(parts: TransportParts) -> Transport:
    from transfer.mooncake.transport import MooncakeTransport

    return MooncakeTransport(
        parts.loop, _on_host(parts), ib_device=parts.ib_device, clock=parts.clock, timings=parts.timings
    )


def _group(backend: BackendName, parts: TransportParts) -> Transport:
    from transfer.dist.transport import GroupTransport

    return GroupTransport(
        backend, parts.loop, _on_host(parts), secret=parts.secret, clock=parts.clock, timings=parts.timings
    )


def _cuda(parts: TransportParts) -> Transport:
    from transfer.cuda.landing import DeviceLanding
    from transfer.cuda.transport import CudaTransport

    assert isinstance(parts.landing, DeviceLanding), "checked by `ways_of`"
    return CudaTransport(parts.loop, parts.landing, clock=parts.clock, timings=parts.timings)


def _on_host(parts: TransportParts) -> Landing:
    assert isinstance(parts.landing, Landing), "checked by `ways_of`"
    return parts.landing


_MAKERS: Mapping[str, Callable[[TransportParts], Transport]] = {
    "shm": _shm,
    "tcp": _tcp,
    "disk": _disk,
    "mooncake": _mooncake,
    "gloo": partial(_group, "gloo"),
    "nccl": partial(_group, "nccl"),
    "cuda": _cuda,
}
