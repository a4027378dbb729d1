"""Paged attention by numba, for machines without a C++ compiler: slower than the C++ kernel, never gathering pages.

numba is imported when the first backend is made, and keeps its compiled code beside its own cache, so that a second
start compiles nothing. Threads are plain ones that sleep between calls; numba's own team would spin against torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.backend import AttentionShape
from engine.attention.rotary import split_and_rotate, write_pages
from engine.batch import Batch
from engine.kv_spec import KVPool

_BLOCK_TOKENS = 16
_HALF_TYPES = (torch.bfloat16, torch.float16)


class JitAttention:
    """`AttentionBackend` on the CPU. Computes in float32 whatever is stored."""

    def __init__(self, shape: AttentionShape, *, num_threads: int) -> None:
        from engine.attention.jit_kernel import attend_blocks  # imports numba, which takes half a second

        self._attend_blocks: Callable[..., None] = attend_blocks
        self._shape = shape
        self._threads = num_threads
        self._helpers = ThreadPoolExecutor(max(1, num_threads - 1), thread_name_prefix="attention")
        self._widened = _widening_table(shape.dtype)
        self._planned: tuple[Batch, KVPool] | None = None
        self._shares: list[npt.NDArray[np.int32]] = []

    def plan(self, batch: Batch, pool: KVPool) -> None:
        """Blocks of query tokens, the costly ones first, dealt out to the threads in turn."""
        self._planned = (batch, pool)
        starts, kv_lens = batch.query_start.tolist(), batch.kv_lens.tolist()
        blocks = []
        for sequence, kv_len in enumerate(kv_lens):
            first, end = starts[sequence], starts[sequence + 1]
            for begin in range(first, end, _BLOCK_TOKENS):
                stop = min(begin + _BLOCK_TOKENS, end)
                keys = kv_len - (end - stop)
                blocks += [(sequence, begin, stop, keys, head) for head in range(self._shape.num_kv_heads)]
        blocks.sort(key=lambda block: -block[3] * (block[2] - block[1]))
        dealt = (blocks[thread :: self._threads] for thread in range(self._threads))
        self._shares = [np.array(share, np.int32) for share in dealt if share]

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
        kv = pool.layer(layer)
        q, k, v = split_and_rotate(self._shape, qkv, batch.positions, q_norm, k_norm)
        write_pages(kv, batch.slots, k, v)
        # numba knows neither bfloat16 nor (well) float16: it sees their bits and a table of what they mean.
        stored = kv.view(torch.uint16) if self._shape.dtype in _HALF_TYPES else kv
        queries = q.float().contiguous().numpy()
        result = torch.empty(q.shape, dtype=torch.float32)
        pages = batch.page_table.numpy()
        arguments = (queries, stored.numpy(), self._widened, pages, self._shape.scale, result.numpy())
        others = [self._helpers.submit(self._attend_blocks, share, *arguments) for share in self._shares[1:]]
        self._attend_blocks(self._shares[0], *arguments)
        wait(others)
        for other in others:
            other.result()
        out.copy_(result.flatten(1))


def _widening_table(dtype: torch.dtype) -> npt.NDArray[np.float32]:
    """The float32 value of each 16-bit pattern; empty for float32, which needs none."""
    if dtype not in _HALF_TYPES:
        return np.empty(0, np.float32)
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    values: npt.NDArray[np.float32] = patterns.view(dtype).float().numpy()
    return values
