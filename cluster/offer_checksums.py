"""What a replica states about the KV it offers: the pool's shape, and checksums of its pages or of parts of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.kv_spec import KVCacheSpec
from protocol.handshake import PoolShape
from transfer.checksum import page_checksums
from transfer.disk.spool import Spool
from transfer.grains import PoolGrains, page_grains
from transfer.layout import whole_grid


def pool_shape(spec: KVCacheSpec, model_id: str) -> PoolShape:
    """Of a pool that holds every KV head of its model."""
    return PoolShape(
        model=model_id,
        dtype=str(spec.dtype).removeprefix("torch."),
        layers=spec.num_layers,
        kv_heads=spec.num_kv_heads,
        page_size=spec.page_size,
        head_dim=spec.head_dim,
        total_kv_heads=spec.num_kv_heads,
    )


class OfferChecksums:
    """Hashes pages of `view`, which its owner keeps, at the moment they are offered; on the engine thread.

    Where not `enabled` every checksum is 0: offered unverified. `spools` are told of the pages that are hashed whole.
    """

    def __init__(self, view: memoryview, shape: PoolShape, *, page_bytes: int, spools: Sequence[Spool], enabled: bool):
        self._view = view
        self._shape = shape
        self._page_bytes = page_bytes
        self._spools = spools
        self._enabled = enabled

    def __call__(self, pages: Sequence[int], grain: int) -> list[int]:
        """One for each page or, unless it is 0 or does not divide a page, for every `grain` tokens of them."""
        if grain == 0 or self._shape.page_size % grain:
            return self._of_pages(pages)
        per_page = self._shape.page_size // grain
        if not self._enabled:
            return [0] * len(pages) * per_page
        grid = whole_grid(self._shape, page_bytes=self._page_bytes, tokens=grain)
        pool = PoolGrains(np.frombuffer(self._view, dtype=np.uint8), grid)
        return pool.checksums(page_grains(pages, per_page))

    def _of_pages(self, pages: Sequence[int]) -> list[int]:
        if not self._enabled:
            return [0] * len(pages)
        checksums = page_checksums(self._view, self._page_bytes, pages)
        for spool in self._spools:
            spool.offer(pages, checksums)
        return checksums
