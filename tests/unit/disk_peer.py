"""A peer that offers its pages by way of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from transfer_pools import WAIT_S, ServedPool

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
