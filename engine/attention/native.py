"""Paged attention by the C++ kernel: the work is divided once per batch, scratch memory is kept between batches."""

from __future__ import annotations

import ctypes

import torch

from engine.attention.backend import AttentionShape
from engine.batch import Batch
from engine.kernels.library import AttentionStep, Library, dtype_code
from engine.kv_spec import KVPool

_WORK_ITEM_INTS = 6
_MERGE_INTS = 4


class NativeAttention:
    """`AttentionBackend` on the CPU; see csrc/attention.h for the algorithm."""

    def __init__(self, shape: AttentionShape, library: Library, *, num_threads: int) -> None:
        self._shape = shape
        self._library = library
        group = shape.num_heads // shape.num_kv_heads
        code = dtype_code(shape.dtype)
        block_tokens = library.block_tokens(group)
        self._scratch = torch.empty(
            num_threads * library.scratch_bytes(code, shape.head_dim, group) + 64, dtype=torch.uint8
        )
        aligned = -(-self._scratch.data_ptr() // 64) * 64
        self._step = AttentionStep(
            dtype=code,
            num_threads=num_threads,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            scale=shape.scale,
            norm_eps=shape.norm_eps,
            rope=None if shape.rope is None else shape.rope.data_ptr(),
            block_tokens=block_tokens,
            scratch=aligned,
        )
        self.step_address = ctypes.addressof(self._step)
        """Of the planned batch's `AttentionStep`, for functions of the library that attend themselves."""
        self._partial_floats = block_tokens * shape.num_heads * (shape.head_dim + 2)
        self._partials = torch.empty(0)
        self._items = torch.empty(0, dtype=torch.int32)
        self._merges = torch.empty(0, dtype=torch.int32)
        self._grow_items(256)
        self._planned: tuple[Batch, KVPool] | None = None

    def plan(self, batch: Batch, pool: KVPool) -> None:
        step, spec = self._step, pool.spec
        if self._planned is None or self._planned[1] is not pool:
            self._check_pool(pool)
            layer_elements = 2 * spec.num_kv_heads * spec.page_size * spec.head_dim
            step.kv = pool.data.data_ptr()
            step.page_size = spec.page_size
            step.page_stride = layer_elements * spec.num_layers
            step.layer_stride = layer_elements
        self._planned = (batch, pool)  # keeps the batch's memory alive while the kernel holds its addresses
        step.num_tokens = batch.num_tokens
        step.num_seqs = batch.num_seqs
        step.max_pages = batch.page_table.shape[1]
        step.positions = batch.positions.data_ptr()
        step.slots = batch.slots.data_ptr()
        step.query_start = batch.query_start.data_ptr()
        step.kv_lens = batch.kv_lens.data_ptr()
        step.page_table = batch.page_table.data_ptr()
        needed = self._library.plan(self.step_address)
        if needed:
            self._grow_items(2 * needed)
            needed = self._library.plan(self.step_address)
            assert not needed, "the plan of one batch needs the same number of items twice"
        if step.num_partials * self._partial_floats > self._partials.numel():
            self._partials = torch.empty(2 * step.num_partials * self._partial_floats)
            step.partials = self._partials.data_ptr()

    def run(
        self,
        layer: int,
        qkv: torch.Tensor,
        out: torch.Tensor,
        *,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
    ) -> None:
        self._library.attend(
            self.step_address,
            layer,
            qkv.data_ptr(),
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            out.data_ptr(),
        )

    def _check_pool(self, pool: KVPool) -> None:
        spec, shape = pool.spec, self._shape
        theirs = (spec.num_kv_heads, spec.head_dim, spec.dtype)
        ours = (shape.num_kv_heads, shape.head_dim, shape.dtype)
        if theirs != ours:
            raise ValueError(f"the KV pool holds (heads, head_dim, dtype) {theirs}, the model needs {ours}")
        if pool.data.device.type != "cpu" or not pool.data.is_contiguous():
            raise ValueError(f"the CPU kernels need a contiguous KV pool on the CPU, not one on {pool.data.device}")

    def _grow_items(self, capacity: int) -> None:
        self._items = torch.empty(capacity * _WORK_ITEM_INTS, dtype=torch.int32)
        self._merges = torch.empty(capacity * _MERGE_INTS, dtype=torch.int32)
        self._step.items = self._items.data_ptr()
        self._step.merges = self._merges.data_ptr()
        self._step.item_capacity = capacity
