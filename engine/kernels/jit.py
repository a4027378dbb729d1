"""The kernels where there is no C++ compiler: attention by numba, the rest by torch operations."""

from __future__ import annotations

import torch

from engine.attention.backend import AttentionBackend, AttentionShape
from engine.attention.jit import JitAttention
from engine.kernels.plain import PlainKernels


class JitKernels:
    """`Kernels` on the CPU without a compiler; numba is imported when attention is first asked for."""

    name = "numba"
    device = torch.device("cpu")

    def __init__(self, *, num_threads: int) -> None:
        self._threads = num_threads
        self._plain = PlainKernels()

    def add_rms_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float
    ) -> None:
        self._plain.add_rms_norm(x, residual, weight, out, eps)

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        self._plain.silu_mul(gate_up, out)

    def attention(self, shape: AttentionShape) -> AttentionBackend:
        return JitAttention(shape, num_threads=self._threads)
