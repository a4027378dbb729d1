"""Sequences whose prefix's KV was moved, by one way or another, before the model goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine.batch import Piece, pack_batch
from engine.kv_spec import KVPool
from engine.model.loader import LoadedModel
from transfer.grains import Bytes, PoolGrains
from transfer.int8_codec import Int8Codec, coded_bytes
from transfer.layout import Grid

Rounding = Callable[[KVPool], None]
"""Does to the KV of a pool what a way of moving it does."""


class Windows:
    """Sequences of equal length, each with pages of its own in one pool.

    The prefixes are computed at once; `reset` goes back to their end.
    """

    def __init__(self, model: LoadedModel, tokens: Sequence[Sequence[int]], *, prefix: int, page_size: int) -> None:
        self._model = model
        self._tokens = [np.asarray(each, dtype=np.int64) for each in tokens]
        self._prefix = prefix
        per_window = -(-len(tokens[0]) // page_size)
        self._pages = np.arange(len(tokens) * per_window, dtype=np.int32).reshape(len(tokens), per_window)
        self.pool = KVPool(spec=model.kv_spec(page_size), num_pages=self._pages.size)
        for index in range(len(tokens)):
            self._forward([index], 0, prefix, num_logits=1)
        self._computed = self.pool.data.clone()

    def reset(self, rounding: Rounding) -> None:
        """Only the prefixes are computed, and their KV has been moved."""
        self.pool.data.copy_(self._computed)
        rounding(self.pool)

    def follow(self, index: int) -> torch.Tensor:
        """float32 `[tokens after the prefix - 1, vocab]`: what the model expects after each of them."""
        end = len(self._tokens[index]) - 1
        return self._forward([index], self._prefix, end, num_logits=end - self._prefix)

    def expected(self, index: int) -> torch.Tensor:
        """What really comes there."""
        return torch.from_numpy(self._tokens[index][self._prefix + 1 :])

    def generate(self, count: int) -> np.ndarray:
        """`[windows, count]`: greedy tokens after each prefix and one token more, which prefill samples."""
        everyone, kept = range(len(self._tokens)), self._tokens
        self._tokens = [each.copy() for each in kept]
        try:
            for at in range(self._prefix, self._prefix + count):
                chosen = self._forward(everyone, at, at + 1, num_logits=1).argmax(dim=-1)
                for tokens, token in zip(self._tokens, chosen.tolist(), strict=True):
                    tokens[at + 1] = token
            return np.stack([each[self._prefix + 1 : self._prefix + count + 1] for each in self._tokens])
        finally:
            self._tokens = kept

    def _forward(self, indices: Sequence[int], start: int, end: int, *, num_logits: int) -> torch.Tensor:
        pieces = [Piece(self._tokens[index], self._pages[index], start, end, num_logits) for index in indices]
        with torch.inference_mode():
            return self._model.forward(pack_batch(pieces, page_size=self.pool.spec.page_size), self.pool)


def as_stored(pool: KVPool) -> None:
    """Leave it."""


def as_bfloat16(pool: KVPool) -> None:
    pool.data.copy_(pool.data.to(torch.bfloat16))


def as_int8(pool: KVPool) -> None:
    """There and back in 8 bits."""
    spec = pool.spec
    grid, codec = whole_pages(pool), Int8Codec(str(spec.dtype).removeprefix("torch."))
    grains = PoolGrains(as_bytes(pool), grid)
    stored, coded = np.empty(grid.grain_bytes, dtype=np.uint8), np.empty(coded_bytes(grid, codec.dtype), dtype=np.uint8)
    for page in range(pool.num_pages):
        grains.gather((page,), stored)
        codec.encode(grid, stored, coded)
        codec.decode(grid, coded, stored)
        grains.scatter((page,), stored)


def as_bytes(pool: KVPool) -> Bytes:
    return np.asarray(pool.data.flatten().view(torch.uint8).numpy())


def whole_pages(pool: KVPool) -> Grid:
    spec = pool.spec
    return Grid(
        layers=spec.num_layers,
        kv_heads=spec.num_kv_heads,
        page_size=spec.page_size,
        row_bytes=spec.head_dim * spec.dtype.itemsize,
        tokens=spec.page_size,
        first_head=0,
        heads=spec.num_kv_heads,
    )
