"""The kernels as plain torch operations: what the others are tested against. Attention gathers pages, so it is slow."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.attention.backend import AttentionBackend, AttentionShape
from engine.attention.plain import PlainAttention


class PlainKernels:
    """`Kernels` on any device."""

    name = "plain"
    device = torch.device("cpu")

    def add_rms_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float
    ) -> None:
        if x is not None:
            residual += x
        wide = residual.float()
        out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float())

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        gate, up = gate_up.float().chunk(2, dim=-1)
        out.copy_(F.silu(gate) * up)

    def attention(self, shape: AttentionShape) -> AttentionBackend:
        return PlainAttention(shape)
