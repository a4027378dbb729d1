"""The C++ kernels as `Kernels`."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.attention.backend import AttentionBackend, AttentionShape
from engine.attention.native import NativeAttention
from engine.kernels.build import build_kernels
from engine.kernels.library import Library, dtype_code


class NativeKernels:
    """`Kernels` in C++. Raises `NativeUnavailable` where they cannot be compiled."""

    name = "native"
    device = torch.device("cpu")

    def __init__(self, *, num_threads: int, library: Path | None = None) -> None:
        self.library = Library(library or build_kernels())
        self.num_threads = num_threads

    def add_rms_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float
    ) -> None:
        rows, width = residual.shape
        self.library.add_rms_norm(
            dtype_code(residual.dtype),
            None if x is None else x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            width,
            eps,
            self.num_threads,
        )

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        rows, width = out.shape
        self.library.silu_mul(dtype_code(out.dtype), gate_up.data_ptr(), out.data_ptr(), rows, width, self.num_threads)

    def attention(self, shape: AttentionShape) -> AttentionBackend:
        return NativeAttention(shape, self.library, num_threads=self.num_threads)
