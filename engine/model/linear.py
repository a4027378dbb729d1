"""Linear layers with weights packed once for the processor's matrix units.

oneDNN chooses the packed layout (`mkldnn._reorder_linear_weight`, the operation torch.compile's freezing uses); on two
cores that made a SmolLM2 step 2.5 times faster than `F.linear`. Types the processor has no fast product for, and other
devices, keep the plain weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from engine.model.checkpoint import LinearWeight

Linear = Callable[[torch.Tensor], torch.Tensor]
"""`x [rows, in] -> [rows, out]`, same type."""


class PlainLinear:
    """`F.linear` over the weight as it is."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """A CPU weight in oneDNN's own layout; the original may be freed."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight.default(weight)
        self._bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._multiply(x, self._weight, self._bias, "none", [], "")
        return product


def make_linear(linear: LinearWeight) -> Linear:
    """The fastest layer for these weights on their device; a packed one keeps only a bias of them alive."""
    if _can_pack(linear.weight):
        return PackedLinear(linear.weight, linear.bias)
    return PlainLinear(linear.weight, linear.bias)


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype is torch.float32
