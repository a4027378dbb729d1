"""A sequence with known KV, and pools of any shape that hold it: what the tests of unequal layouts compare with.

Each number says where it belongs: token, layer, head, K or V, dimension. Pools are indexed here as plainly as can be.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from protocol.handshake import PoolShape

LAYERS, HEAD_DIM = 3, 2


@dataclass(frozen=True, kw_only=True)
class KVPool:
    """One rank's pool: values of 32 bits as uint8, the sequence's tokens in `pages`, garbage elsewhere."""

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
    int8: bool = False
    """The numbers are float32, and others when they have been in 8 bits."""

    @property
    def kv(self) -> np.ndarray:
        """What takers have: int32 `[token, layer, head, 2, dim]`, all numbers different; or the bits of float32, whole
        numbers up to 127, which is the largest in every block that goes into 8 bits."""
        shape = (self.tokens, LAYERS, self.kv_heads, 2, HEAD_DIM)
        numbers = np.arange(1, math.prod(shape) + 1, dtype=np.int32).reshape(shape)
        if not self.int8:
            return numbers
        codes = numbers * 37 % 253 - 126
        codes[..., 0] = 127
        return codes.astype(np.float32).view(np.int32)

    @property
    def given(self) -> np.ndarray:
        """What givers have: the same, or in `int8` what is rounded to that."""
        if not self.int8:
            return self.kv
        values = self.kv.view(np.float32).copy()
        values[..., 1:] += 0.25
        return values.view(np.int32)

    def pool(self, *, tp_rank: int, tp_size: int, page_size: int, seed: int, filled: bool = True) -> KVPool:
        local = max(1, self.kv_heads // tp_size)
        shape = PoolShape(
            model="a model",
            dtype="float32" if self.int8 else "int32",
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
        if self.int8:  # in a block with what counts
            memory = random.uniform(-100, 100, len(memory) // 4).astype(np.float32).view(np.uint8)
        pool = KVPool(
            shape=shape, pages=random.permutation(num_pages)[:used].tolist(), memory=memory, page_bytes=page_bytes
        )
        if filled:
            for token, expected in enumerate(self.given):
                self._place(pool, token)[...] = expected[:, self.heads_of(shape)]
        return pool

    def heads_of(self, shape: PoolShape) -> list[int]:
        """The numbers in the model of a rank's heads."""
        if self.kv_heads >= shape.tp_size:
            return [shape.tp_rank * shape.kv_heads + local for local in range(shape.kv_heads)]
        return [shape.tp_rank // (shape.tp_size // self.kv_heads)]

    def check(self, pool: KVPool) -> None:
        """The pool has the whole sequence."""
        for token, expected in enumerate(self.kv):
            assert np.array_equal(self._place(pool, token), expected[:, self.heads_of(pool.shape)]), f"token {token}"

    def check_untouched(self, pool: KVPool, before: np.ndarray, *, grain: int) -> None:
        """Nothing but the sequence, in whole grains, was written since the memory was `before`."""
        now, size = pool.memory.copy(), pool.shape.page_size
        then = dataclasses.replace(pool, memory=before.copy())
        changed = dataclasses.replace(pool, memory=now)
        for token in range(min(-(-self.tokens // grain) * grain, len(pool.pages) * size)):
            self._place(changed, token)[...] = self._place(then, token)
        assert np.array_equal(changed.memory, then.memory)

    def _place(self, pool: KVPool, token: int) -> np.ndarray:
        """int32 `[layer, head, 2, dim]`: where the pool has a token."""
        size = pool.shape.page_size
        return pool.values()[pool.pages[token // size], :, :, :, token % size]
