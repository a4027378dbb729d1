"""The bytes of grains (`layout.py`): gathered out of a pool, put into one, hashed.

A `PoolGrains` holds views of the pool's memory, which cannot be unmapped before it has gone: make one where it is
needed and keep none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from transfer.layout import Grid

Bytes = npt.NDArray[np.uint8]


class PoolGrains:
    """`pool`, uint8 [bytes of whole pages and maybe more], as the grains of `grid`."""

    def __init__(self, pool: Bytes, grid: Grid) -> None:
        num_pages = pool.nbytes // grid.page_bytes
        pages = pool[: num_pages * grid.page_bytes].reshape(
            num_pages, grid.layers, grid.kv_heads, 2, grid.per_page, grid.tokens * grid.row_bytes
        )
        heads = pages[:, :, grid.first_head : grid.first_head + grid.heads]
        self._grid = grid
        self._grains = heads.transpose(0, 4, 1, 2, 3, 5)
        """`[page, grain in page, layers, heads, 2, bytes of the grain's tokens]`."""
        self.count = num_pages * grid.per_page

    def gather(self, grains: Sequence[int], packed: Bytes) -> None:
        """Copy `grains` one behind the other into `packed`, uint8 [grains * grain_bytes]."""
        for grain, row in zip(grains, self._rows(packed, len(grains)), strict=True):
            row[...] = self._grains[divmod(grain, self._grid.per_page)]

    def scatter(self, grains: Sequence[int], packed: Bytes) -> None:
        """Copy what `gather` made into the places of `grains`."""
        for grain, row in zip(grains, self._rows(packed, len(grains)), strict=True):
            self._grains[divmod(grain, self._grid.per_page)] = row

    def checksums(self, grains: Sequence[int]) -> list[int]:
        """The xxh3-64 of each grain as it is packed. Raises `ValueError` for one that is not in the pool."""
        if grains and not (min(grains) >= 0 and max(grains) < self.count):
            raise ValueError(f"grains {min(grains)} to {max(grains)} asked for, of a pool of {self.count}")
        packed = np.empty(self._grid.grain_bytes, dtype=np.uint8)
        sums = []
        for grain in grains:
            self.gather((grain,), packed)
            sums.append(xxhash.xxh3_64_intdigest(packed.data))
        return sums

    def _rows(self, packed: Bytes, count: int) -> Bytes:
        return packed[: count * self._grid.grain_bytes].reshape(count, *self._grains.shape[2:])


def page_grains(pages: Sequence[int], per_page: int) -> list[int]:
    """The grains that `pages` consist of, in order."""
    return [page * per_page + index for page in pages for index in range(per_page)]
