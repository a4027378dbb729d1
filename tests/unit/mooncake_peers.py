"""Peers with a mooncake door for the tests of transfer/mooncake; run as a program it is one in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from transfer_pools import LAYOUT, SECRET, WAIT_S, closing, pattern

from protocol.handshake import RegionTicket
from protocol.rooms import PeerAddress
from transfer.checksum import page_checksums
from transfer.memory import SharedMemory
from transfer.mooncake.door import MooncakeDoor
from transfer.mooncake.library import import_failure
from transfer.server import PageServer

try:
    import mooncake.engine  # noqa: F401
except ImportError as error:
    needs_library = pytest.mark.skip(reason=import_failure(str(error)))
else:
    needs_library = pytest.mark.skipif(False, reason="")


class MooncakePool:
    """A peer in this process: memory full of its pattern, a door and a server."""

    def __init__(self, *, boot: int, page_bytes: int = 4096, num_pages: int = 64) -> None:
        self.page_bytes = page_bytes
        self.memory = SharedMemory(page_bytes * num_pages)
        np.frombuffer(self.memory.view, dtype=np.uint8)[:] = pattern(boot, self.memory.nbytes)
        self.door = MooncakeDoor(memory=self.memory, host="127.0.0.1")
        self.server = PageServer(
            memory=self.memory,
            page_bytes=page_bytes,
            num_pages=num_pages,
            layout=LAYOUT,
            host="127.0.0.1",
            boot=boot,
            secret=SECRET,
            doors=[self.door],
        )
        self.address = PeerAddress(f"replica-{boot}", boot, "127.0.0.1", 1)
        self.ticket = self.server.ticket()

    def checksums(self, pages: list[int]) -> list[int]:
        return page_checksums(self.memory.view, self.page_bytes, pages)

    def page(self, page: int) -> bytes:
        return bytes(self.memory.view[page * self.page_bytes : (page + 1) * self.page_bytes])

    def close(self) -> None:
        self.server.close()
        self.door.close(timeout_s=WAIT_S)
        self.memory.close()


class MooncakeProcess:
    """A `MooncakePool` in a process of its own, which ends with this one at the latest."""

    def __init__(self, *, boot: int, page_bytes: int = 4096, num_pages: int = 64) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(boot), str(page_bytes), str(num_pages)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert self._process.stdout is not None
        self.door_pid = int(self._process.stdout.readline())
        self.ticket = msgspec.json.decode(self._process.stdout.readline(), type=RegionTicket)
        self.address = PeerAddress(f"replica-{boot}", boot, "127.0.0.1", 1)
        self.content = pattern(boot, page_bytes * num_pages).reshape(num_pages, page_bytes)

    def page(self, page: int) -> bytes:
        return self.content[page].tobytes()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(WAIT_S)

    def close(self) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def main() -> None:
    boot, page_bytes, num_pages = map(int, sys.argv[1:])
    with closing(MooncakePool(boot=boot, page_bytes=page_bytes, num_pages=num_pages)) as (pool,):
        sys.stdout.buffer.write(b"%d\n%s\n" % (pool.door.pid, msgspec.json.encode(pool.ticket)))
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
