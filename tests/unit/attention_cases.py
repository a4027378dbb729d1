"""Random batches over a scattered page table, to run one attention backend beside another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.backend import AttentionBackend, AttentionShape
from engine.batch import Batch, Piece, pack_batch
from engine.kv_spec import KVCacheSpec, KVPool
from engine.model.rope import RopeConfig

ROPE_POSITIONS = 4096


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sequences as (tokens computed before, tokens after this step)."""

    spans: Sequence[tuple[int, int]]
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    page_size: int = 16
    rotated: bool = True
    normed: bool = False

    def shape(self, dtype: torch.dtype) -> AttentionShape:
        rope = RopeConfig(theta=10000.0, head_dim=self.head_dim, scaling=None).table(ROPE_POSITIONS)
        return AttentionShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            scale=self.head_dim**-0.5,
            rope=rope if self.rotated else None,
            norm_eps=1e-6,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What one layer's attention is given; `fresh_pool` holds the K and V of earlier tokens, the same each time."""

    shape: AttentionShape
    batch: Batch
    spec: KVCacheSpec
    stored: torch.Tensor
    qkv: torch.Tensor
    norms: tuple[torch.Tensor, torch.Tensor] | tuple[None, None]

    def fresh_pool(self) -> KVPool:
        pool = KVPool(spec=self.spec, num_pages=self.stored.shape[0])
        pool.data.copy_(self.stored)
        return pool

    def run(self, backend: AttentionBackend) -> tuple[torch.Tensor, torch.Tensor]:
        """The last layer's output `[tokens, heads * head_dim]` and the pool's content afterwards."""
        pool = self.fresh_pool()
        backend.plan(self.batch, pool)
        out = torch.full((self.batch.num_tokens, self.shape.num_heads * self.shape.head_dim), float("nan"))
        out = out.to(self.shape.dtype)
        q_norm, k_norm = self.norms
        backend.run(self.spec.num_layers - 1, self.qkv.clone(), out, q_norm=q_norm, k_norm=k_norm)
        return out, pool.data


def make_inputs(case: Case, dtype: torch.dtype, *, seed: int = 0) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    needed = [-(-end // case.page_size) for _, end in case.spans]
    num_pages = sum(needed) + 3
    order = torch.randperm(num_pages, generator=random).numpy().astype(np.int32)
    pieces, taken = [], 0
    for (start, end), count in zip(case.spans, needed, strict=True):
        pages = order[taken : taken + count]
        pieces.append(Piece(np.zeros(end, np.int64), pages, start, end, True))
        taken += count
    batch = pack_batch(pieces, page_size=case.page_size)
    spec = KVCacheSpec(
        num_layers=2,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype=dtype,
    )
    shape = case.shape(dtype)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=random).to(dtype)

    q_norm, k_norm = (normal(case.head_dim).abs() + 0.5 for _ in range(2))
    return Inputs(
        shape=shape,
        batch=batch,
        spec=spec,
        stored=normal(num_pages, *spec.page_shape),
        qkv=2 * normal(batch.num_tokens, shape.qkv_width),
        norms=(q_norm, k_norm) if case.normed else (None, None),
    )
