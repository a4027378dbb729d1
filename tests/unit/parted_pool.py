"""Peers of the random schedules whose pages are not ours: their KV moves in parts of pages, or in 8 bits, or both."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import xxhash
from transfer_pools import ServedPool
from transfer_world import PAGE, SOURCE_PAGES

from protocol.handshake import PoolShape
from transfer.grains import PoolGrains
from transfer.int8_codec import Int8Codec, coded_bytes
from transfer.layout import cut_between, whole_grid

OURS = PoolShape(
    model="m", dtype="bfloat16", layers=2, kv_heads=1, page_size=4, head_dim=8, total_kv_heads=2, tp_rank=1, tp_size=2
)
THEIRS = msgspec.structs.replace(OURS, kv_heads=2, tp_rank=0, tp_size=1)
CODEC = Int8Codec("bfloat16")


class PartedPool(ServedPool):
    """`page` and `checksums` are of what comes out of it for one page of ours."""

    def __init__(self, *, boot: int, shape: PoolShape, codec: Int8Codec | None) -> None:
        super().__init__(boot=boot, num_pages=SOURCE_PAGES, page_bytes=PAGE * shape.kv_heads, shape=shape, codec=codec)
        cut = cut_between(shape, self.page_bytes, OURS, PAGE)
        self._grid = whole_grid(OURS, page_bytes=PAGE, tokens=OURS.page_size) if cut is None else cut.source
        self._codec = codec

    def stored(self, page: int) -> np.ndarray:
        packed = np.empty(PAGE, dtype=np.uint8)
        PoolGrains(np.frombuffer(self.memory.view, dtype=np.uint8), self._grid).gather((page,), packed)
        return packed

    def page(self, page: int) -> bytes:
        packed = self.stored(page)
        if self._codec is not None:
            coded = np.empty(coded_bytes(self._grid, "bfloat16"), dtype=np.uint8)
            self._codec.encode(self._grid, packed, coded)
            self._codec.decode(self._grid, coded, packed)
        return packed.tobytes()

    def checksums(self, pages: Sequence[int]) -> list[int]:
        return [xxhash.xxh3_64_intdigest(self.stored(page)) for page in pages]
