"""Which transports a fetcher uses, by the name in the configuration, and how they are made.

A name stands for the ways that are tried, in order, before a transfer is given up: the one that was asked for, then our
own TCP, which needs nothing but a route. What a transport of a name needs is imported only where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from transfer.disk.folders import check_shared
from transfer.dist.orders import BackendName
from transfer.io_loop import IoLoop
from transfer.landing import Landing
from transfer.shm import ShmTransport
from transfer.tcp import TcpTransport
from transfer.transport import TransferTimings, Transport

TransportName = Literal["auto", "shm", "tcp", "disk", "mooncake", "gloo", "nccl"]

_WAYS: Mapping[TransportName, tuple[str, ...]] = {
    "auto": ("shm", "tcp"),
    "shm": ("shm",),
    "tcp": ("tcp",),
    "mooncake": ("mooncake", "tcp"),
    "gloo": ("gloo", "tcp"),
    "nccl": ("nccl", "tcp"),
    "disk": ("disk",),
}


@dataclass(frozen=True, kw_only=True)
class TransportParts:
    """What a fetcher gives each of its transports."""

    loop: IoLoop
    landing: Landing
    secret: bytes
    num_threads: int
    """That may copy within the host."""
    clock: Callable[[], float]
    timings: TransferTimings
    ib_device: str = ""
    """The RDMA devices of `mooncake`; empty for its TCP."""
    folder: Path | None = None
    """That `disk` shares with the peers."""


def ways_of(name: TransportName, *, folder: Path | None = None) -> tuple[str, ...]:
    """The ways that `name` stands for, in the order in which they are tried. Raises `ValueError` for another name, and
    when what one of them needs is not there."""
    if name not in _WAYS:
        raise ValueError(f"transport {name!r} is not one of {', '.join(get_args(TransportName))}")
    if "disk" in _WAYS[name]:
        check_shared(folder)
    return _WAYS[name]


def make_transports(ways: Sequence[str], parts: TransportParts) -> list[Transport]:
    """A transport for each way, in the same order."""
    return [_MAKERS[way](parts) for way in ways]


def _shm(parts: TransportParts) -> Transport:
    return ShmTransport(
        parts.loop,
        parts.landing,
        secret=parts.secret,
        num_threads=parts.num_threads,
        clock=parts.clock,
        timings=parts.timings,
    )


def _tcp(parts: TransportParts) -> Transport:
    return TcpTransport(parts.loop, parts.landing, secret=parts.secret, clock=parts.clock, timings=parts.timings)


def _disk(parts: TransportParts) -> Transport:
    from transfer.disk.transport import DiskTransport

    assert parts.folder is not None, "checked by `ways_of`"
    return DiskTransport(
        parts.loop, parts.landing, folder=parts.folder, num_threads=parts.num_threads, clock=parts.clock
    )


def _mooncake(parts: TransportParts) -> Transport:
    from transfer.mooncake.transport import MooncakeTransport

    return MooncakeTransport(
        parts.loop, parts.landing, ib_device=parts.ib_device, clock=parts.clock, timings=parts.timings
    )


def _group(backend: BackendName, parts: TransportParts) -> Transport:
    from transfer.dist.transport import GroupTransport

    return GroupTransport(
        backend, parts.loop, parts.landing, secret=parts.secret, clock=parts.clock, timings=parts.timings
    )


_MAKERS: Mapping[str, Callable[[TransportParts], Transport]] = {
    "shm": _shm,
    "tcp": _tcp,
    "disk": _disk,
    "mooncake": _mooncake,
    "gloo": partial(_group, "gloo"),
    "nccl": partial(_group, "nccl"),
}
