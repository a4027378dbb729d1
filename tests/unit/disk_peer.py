"""Peers that offer their pages by way of a folder; run as a program, one in a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from transfer_pools import WAIT_S, ServedPool, closing, pattern

from protocol.handshake import RegionTicket
from protocol.rooms import PeerAddress
from transfer.disk.packs import SpoolLimits
from transfer.disk.spool import Spool


class SpoolingPool(ServedPool):
    """A peer in this process that also has a spool in `folder`."""

    def __init__(
        self, folder: Path, *, boot: int, limits: SpoolLimits | None = None, spool_clock=None, **sizes
    ) -> None:
        super().__init__(boot=boot, **sizes)
        extra = {} if spool_clock is None else {"clock": spool_clock}
        self.spool = Spool(
            folder=folder,
            view=self.memory.view,
            page_bytes=self.page_bytes,
            replica_id=self.address.replica_id,
            boot=boot,
            limits=limits,
            **extra,
        )
        self.folder = folder / self.spool.address()
        self.ticket = msgspec.structs.replace(self.ticket, doors={"disk": self.spool.address()})

    def offer(self, pages: Sequence[int]) -> list[int]:
        """As the engine thread does; the checksums of the pages."""
        checksums = self.checksums(pages)
        self.spool.offer(pages, checksums)
        return checksums

    def write(self, pages: Sequence[int]) -> list[int]:
        """Offer pages and wait until they are dealt with."""
        checksums = self.offer(pages)
        assert self.spool.wait_idle(WAIT_S), "the spool does not write"
        return checksums

    def packs(self) -> list[Path]:
        return sorted(self.folder.glob("*.pages"))

    def close(self) -> None:
        self.spool.close(timeout_s=WAIT_S)
        super().close()


class SpoolingProcess:
    """A peer in a process of its own, which has offered `pages`. With `file_limit` no file of it grows beyond that."""

    def __init__(
        self,
        folder: Path,
        pages: Sequence[int],
        *,
        boot: int,
        page_bytes: int = 4096,
        num_pages: int = 64,
        file_limit: int = 0,
    ) -> None:
        root = Path(__file__).parents[2]
        command = [sys.executable, __file__, str(folder), *map(str, [boot, page_bytes, num_pages, file_limit, *pages])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}
        )
        assert self._process.stdout is not None
        self.ticket, self.checksums = msgspec.json.decode(
            self._process.stdout.readline(), type=tuple[RegionTicket, list[int]]
        )
        self.address = PeerAddress(f"replica-{boot}", boot, "127.0.0.1", 1)
        self.folder = folder / self.ticket.doors["disk"]
        self._content = pattern(boot, page_bytes * num_pages).reshape(num_pages, page_bytes)

    def page(self, page: int) -> bytes:
        return self._content[page].tobytes()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(WAIT_S)

    def close(self) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def main() -> None:
    folder, (boot, page_bytes, num_pages, file_limit, *pages) = Path(sys.argv[1]), map(int, sys.argv[2:])
    with closing(SpoolingPool(folder, boot=boot, page_bytes=page_bytes, num_pages=num_pages)) as (pool,):
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        answer = (pool.ticket, pool.offer(pages))
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
