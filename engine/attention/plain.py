"""Paged attention by plain torch operations, one sequence after another: the reference for the other backends."""

from __future__ import annotations

import torch

from engine.attention.backend import AttentionShape
from engine.attention.rotary import split_and_rotate, write_pages
from engine.batch import Batch
from engine.kv_spec import KVPool


class PlainAttention:
    """`AttentionBackend` on the CPU. Computes in float32 whatever is stored."""

    def __init__(self, shape: AttentionShape) -> None:
        self._shape = shape
        self._planned: tuple[Batch, KVPool] | None = None

    def plan(self, batch: Batch, pool: KVPool) -> None:
        self._planned = (batch, pool)

    def run(
        self,
        layer: int,
        qkv: torch.Tensor,
        out: torch.Tensor,
        *,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
    ) -> None:
        assert self._planned is not None, "plan comes before run"
        batch, pool = self._planned
        kv, page_size = pool.layer(layer), pool.spec.page_size
        q, k, v = split_and_rotate(self._shape, qkv, batch.positions, q_norm, k_norm)
        write_pages(kv, batch.slots, k, v)
        starts = batch.query_start.tolist()
        for sequence, kv_len in enumerate(batch.kv_lens.tolist()):
            rows = slice(starts[sequence], starts[sequence + 1])
            used = batch.page_table[sequence, : -(-kv_len // page_size)].long()
            # [pages, kv_heads, 2, page_size, head_dim] -> [2, kv_heads, tokens, head_dim]
            flat = kv[used].permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :kv_len].float()
            attended = _attend(q[rows].transpose(0, 1).float(), flat[0], flat[1], self._shape.scale)
            out[rows] = attended.transpose(0, 1).flatten(1).to(out.dtype)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last tokens `q [heads, n, dim]` over `k, v [kv_heads, m, dim]`; `[heads, n, dim]`."""
    queries, keys = q.shape[1], k.shape[1]
    group = q.shape[0] // k.shape[0]
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return weights @ v.repeat_interleave(group, 0)
