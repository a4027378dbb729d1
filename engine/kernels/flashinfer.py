"""The kernels of NVIDIA GPUs, all from flashinfer, which is imported when a model is first put on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from engine.attention.backend import AttentionBackend, AttentionShape
from engine.attention.flashinfer import FlashInferAttention


class FlashInferKernels:
    """`Kernels` on a CUDA device. Raises ImportError where flashinfer is not installed."""

    name = "flashinfer"

    def __init__(self, device: torch.device) -> None:
        import flashinfer

        self.device = device
        self._flashinfer: Any = flashinfer

    def add_rms_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float
    ) -> None:
        if x is not None:
            residual += x
        self._flashinfer.norm.rmsnorm(residual, weight, eps, out=out)

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        self._flashinfer.activation.silu_and_mul(gate_up, out=out)

    def attention(self, shape: AttentionShape) -> AttentionBackend:
        return FlashInferAttention(shape, self.device, self._flashinfer)
