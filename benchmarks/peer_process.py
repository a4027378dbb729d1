"""The process that plays the peer in a benchmark of a transport: both ends of starting it.

Lifecycle: `peer` starts `python -m MODULE ARGUMENTS` for as long as its context lasts, and gives it the secret by
standard input. The process makes a pool of known bytes, serves it, says that it is ready (`say_ready`), and ends when
its standard input does (`wait_for_end`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.pages import BOOT, LAYOUT, SECRET
from benchmarks.slow_link import LOOPBACK, Link
from protocol.handshake import RegionTicket
from transfer.door import Door
from transfer.memory import SharedMemory
from transfer.server import PageServer


class PeerReady(msgspec.Struct):
    """What a peer says when it is up. Benchmarks add what else they must know of it."""

    ticket: RegionTicket
    checksums: list[int]
    """Of its pages."""


_Ready = TypeVar("_Ready", bound=PeerReady)


@contextmanager
def peer(module: str, *arguments: object, ready: type[_Ready], link: Link = LOOPBACK) -> Iterator[_Ready]:
    """A peer in its own process at the other end of `link`, for as long as the context lasts."""
    command = [*link.command, sys.executable, "-m", module, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(SECRET)
        process.stdin.flush()
        yield msgspec.json.decode(process.stdout.readline(), type=ready)
        process.stdin.close()


# ---- in the peer's process ------------------------------------------------------------------------------------------


def read_secret() -> bytes:
    """The benchmark's; to be read first."""
    return sys.stdin.buffer.read(len(SECRET))


def known_bytes(nbytes: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)


def filled_pool(nbytes: int) -> SharedMemory:
    memory = SharedMemory(nbytes)
    np.frombuffer(memory.view, dtype=np.uint8)[:] = known_bytes(nbytes)
    return memory


def serve_pool(
    memory: SharedMemory,
    *,
    page_bytes: int,
    num_pages: int,
    secret: bytes,
    doors: Sequence[Door],
    host: str = LOOPBACK.there,
) -> PageServer:
    return PageServer(
        memory=memory,
        page_bytes=page_bytes,
        num_pages=num_pages,
        layout=LAYOUT,
        host=host,
        boot=BOOT,
        secret=secret,
        doors=doors,
    )


def say_ready(ready: PeerReady) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(ready) + b"\n")
    sys.stdout.flush()


def wait_for_end() -> None:
    sys.stdin.read()
