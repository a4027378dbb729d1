"""What the native decoder asks of a device: two fused elementwise kernels, and an attention backend.

Implementations: `native.py` (C++), `jit.py` (numba), `plain.py` (torch operations), `flashinfer.py` (NVIDIA GPUs).
"""

from __future__ import annotations

from typing import Protocol

import torch

from engine.attention.backend import AttentionBackend, AttentionShape


class Kernels(Protocol):
    """All tensors dense, row-major, of one floating point type and on one device. Nothing is allocated."""

    name: str
    device: torch.device

    def add_rms_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float
    ) -> None:
        """`residual [rows, width] += x` (unless None), then `out = residual / rms(residual) * weight [width]`.

        Sums are float32 whatever the type; `out` must not share memory with `residual`.
        """

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """`out [rows, width] = silu(gate) * up`, where `gate_up [rows, 2 * width]` is gate, then up."""

    def attention(self, shape: AttentionShape) -> AttentionBackend:
        """A backend of this device for layers of `shape`."""
