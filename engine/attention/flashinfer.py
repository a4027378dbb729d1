"""Paged attention by flashinfer on NVIDIA GPUs, over the same page layout as the CPU kernels.

A layer's pages `[pages, kv_heads, 2, page_size, head_dim]` are
given to it as two strided views, K and V, in its "HND" order, so nothing is copied. Batches in which every sequence has
one token take its decode kernel, all others its prefill kernel. docs/gpu-checks.md says what has been run.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.attention.backend import AttentionShape
from engine.attention.rotary import split_and_rotate, write_pages
from engine.batch import Batch
from engine.kv_spec import KVPool

_WORKSPACE_BYTES = 128 << 20
_LAYOUT = "HND"
_TENSOR_CORE_GROUP = 4  # query heads to a KV head from which flashinfer's decode gains from tensor cores


class FlashInferAttention:
    """`AttentionBackend` on a CUDA device. `flashinfer` is the imported module."""

    def __init__(self, shape: AttentionShape, device: torch.device, flashinfer: Any) -> None:
        self._shape = shape
        self._device = device
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        group = shape.num_heads // shape.num_kv_heads
        self._prefill: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, _LAYOUT)
        self._decode: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, _LAYOUT, use_tensor_cores=group >= _TENSOR_CORE_GROUP
        )
        self._wrapper: Any = None
        self._pool: KVPool | None = None
        self._positions = self._slots = torch.empty(0, dtype=torch.int64, device=device)

    def plan(self, batch: Batch, pool: KVPool) -> None:
        shape, page_size = self._shape, pool.spec.page_size
        self._pool = pool
        self._positions = batch.positions.to(self._device, non_blocking=True)
        self._slots = batch.slots.to(self._device, non_blocking=True)
        # Starts and lengths stay on the CPU, where flashinfer's planning reads them.
        page_starts, pages, last_page_lens = page_lists(batch, page_size)
        pages = pages.to(self._device, non_blocking=True)
        types = {"q_data_type": shape.dtype, "kv_data_type": shape.dtype, "sm_scale": shape.scale}
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim, page_size)
        if batch.num_tokens == batch.num_seqs:
            self._wrapper = self._decode
            self._decode.plan(page_starts, pages, last_page_lens, *heads, **types)
        else:
            self._wrapper = self._prefill
            self._prefill.plan(batch.query_start, page_starts, pages, last_page_lens, *heads, causal=True, **types)

    def run(
        self,
        layer: int,
        qkv: torch.Tensor,
        out: torch.Tensor,
        *,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
    ) -> None:
        assert self._pool is not None, "plan comes before run"
        kv = self._pool.layer(layer)
        q, k, v = split_and_rotate(self._shape, qkv, self._positions, q_norm, k_norm)
        write_pages(kv, self._slots, k, v)
        self._wrapper.run(q.contiguous(), (kv[:, :, 0], kv[:, :, 1]), out=out.view(q.shape))


def page_lists(batch: Batch, page_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The batch's page table without padding, int32: where each sequence's pages begin `[seqs + 1]` in the list of all
    pages `[pages]`, and how many tokens lie in each sequence's last page `[seqs]`."""
    counts = (batch.kv_lens + page_size - 1) // page_size
    starts = torch.zeros(batch.num_seqs + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    used = torch.arange(batch.page_table.shape[1]) < counts.unsqueeze(1)
    return starts, batch.page_table[used], (batch.kv_lens - 1) % page_size + 1
