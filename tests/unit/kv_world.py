"""A sequence with known KV, and pools of any shape that hold it: what the tests of unequal layouts compare with.

Each number says where it belongs: token, layer, head, K or V, dimension. Pools are indexed here as plainly as can be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protocol.handshake import PoolShape

LAYERS, HEAD_DIM = 3, 2


@dataclass(frozen=True, kw_only=True)
class KVPool:
    """One rank's pool: int32 values as uint8, the sequence's tokens in `pages`, garbage elsewhere."""

    shape: PoolShape
    pages: list[int]
    memory: np.ndarray
    page_bytes: int

    def page(self, page: int, memory: np.ndarray | None = None) -> np.ndarray:
        data = self.memory if memory is None else memory
        return data[page * self.page_bytes : (page + 1) * self.page_bytes]

    def values(self) -> np.ndarray:
        """int32 `[page, layer, head, 2, token, dim]`."""
        shape = self.shape
        return self.memory.view(np.int32).reshape(-1, LAYERS, shape.kv_heads, 2, shape.page_size, HEAD_DIM)


@dataclass(frozen=True, kw_only=True)
class KVWorld:
    """A model of `kv_heads` and a sequence of `tokens`."""

    kv_heads: int
    tokens: int

    def value(self, token: int, layer: int, head: int, kv: int) -> np.ndarray:
        first = (((token * LAYERS + layer) * self.kv_heads + head) * 2 + kv) * HEAD_DIM
        return np.arange(first, first + HEAD_DIM, dtype=np.int32) + 1

    def pool(self, *, tp_rank: int, tp_size: int, page_size: int, seed: int, filled: bool = True) -> KVPool:
        local = max(1, self.kv_heads // tp_size)
        shape = PoolShape(
            model="a model",
            dtype="int32",
            layers=LAYERS,
            kv_heads=local,
            page_size=page_size,
            head_dim=HEAD_DIM,
            total_kv_heads=self.kv_heads,
            tp_rank=tp_rank,
            tp_size=tp_size,
        )
        random = np.random.default_rng(seed)
        used = -(-self.tokens // page_size)
        num_pages = used + 3
        page_bytes = LAYERS * local * 2 * page_size * HEAD_DIM * 4
        memory = random.integers(0, 256, num_pages * page_bytes, dtype=np.uint8)
        pool = KVPool(
            shape=shape, pages=random.permutation(num_pages)[:used].tolist(), memory=memory, page_bytes=page_bytes
        )
        if filled:
            for token, layer, head, kv in np.ndindex(self.tokens, LAYERS, local, 2):
                page = pool.pages[token // page_size]
                pool.values()[page, layer, head, kv, token % page_size] = self.value(
                    token, layer, self.head_of(shape, head), kv
                )
        return pool

    def head_of(self, shape: PoolShape, local: int) -> int:
        """The number in the model of a rank's head."""
        if self.kv_heads >= shape.tp_size:
            return shape.tp_rank * (self.kv_heads // shape.tp_size) + local
        return shape.tp_rank // (shape.tp_size // self.kv_heads)

    def check(self, pool: KVPool) -> None:
        """The pool has the whole sequence."""
        values, shape = pool.values(), pool.shape
        for token, layer, head, kv in np.ndindex(self.tokens, LAYERS, shape.kv_heads, 2):
            found = values[pool.pages[token // shape.page_size], layer, head, kv, token % shape.page_size]
            expected = self.value(token, layer, self.head_of(shape, head), kv)
            assert np.array_equal(found, expected), (token, layer, head, kv)
