"""A peer with a pool in GPU memory, in a process of its own: `python gpu_peer.py BOOT PAGE_BYTES PAGES`.

It says its ticket and lives until standard input ends.
"""

from __future__ import annotations

import sys

import msgspec
import numpy as np

from transfer.cuda.door import CudaDoor, device_ticket
from transfer.cuda.library import CudaDriver
from transfer.cuda.memory import DeviceMemory

LAYOUT = "layout of the tests"


def content(boot: int, nbytes: int) -> bytes:
    """What the pool of `boot` holds."""
    return np.random.default_rng(boot).integers(0, 256, nbytes, dtype=np.uint8).tobytes()


def main() -> None:
    boot, page_bytes, num_pages = map(int, sys.argv[1:])
    memory = DeviceMemory(CudaDriver(), page_bytes * num_pages)
    memory.write(0, bytearray(content(boot, memory.nbytes)))
    ticket = device_ticket(CudaDoor(memory), num_pages=num_pages, page_bytes=page_bytes, layout=LAYOUT)
    sys.stdout.buffer.write(msgspec.json.encode(ticket) + b"\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
