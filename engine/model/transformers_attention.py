"""Our attention in the place of a transformers model's own: what stands in each layer, and what it does.

transformers calls the function registered here, which hands over to the `AttentionSlot` that the load put into each
attention module. The slot holds a `Recorder` during the probe, and `PagedAttention` from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from engine.attention.backend import AttentionBackend
from engine.model.errors import UnsupportedModelError
from engine.model.transformers_refusals import refuse_by_call

ATTENTION_NAME = "pd_serve_paged"
_SLOT = "pd_serve_attention"


class Attention(Protocol):
    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """`[1, tokens, heads, head_dim]` from query `[1, heads, tokens, head_dim]`, key and value with their heads."""


class AttentionSlot:
    """Stands in every attention module of a model and holds what attends now."""

    def __init__(self, model: torch.nn.Module, attention: Attention) -> None:
        """Put itself into every module that knows its layer's number."""
        self.attention = attention
        for module in model.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, _SLOT, self)


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What one layer asks of attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float


class Recorder:
    """Plain causal attention over one sequence that notes what each layer asks for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.facts: dict[int, LayerFacts] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        refuse_by_call(self._name, arguments, mask)
        if value.shape != key.shape or query.shape[-1] != key.shape[-1]:
            raise UnsupportedModelError(
                f"{self._name} has queries, keys and values of unequal width ({query.shape[-1]}, {key.shape[-1]}, "
                f"{value.shape[-1]}), which KV pages here do not hold; use another model"
            )
        if layer in self.facts:
            raise UnsupportedModelError(f"{self._name} attends twice in layer {layer}; use another model")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        self.facts[layer] = LayerFacts(
            num_heads=query.shape[1], num_kv_heads=key.shape[1], head_dim=query.shape[-1], scale=scale
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous()


class PagedAttention:
    """Attention over pages by a backend, which the decoder plans before each batch."""

    def __init__(self, backend: AttentionBackend, dtype: torch.dtype) -> None:
        self._backend = backend
        self._dtype = dtype

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        tokens, head_dim = query.shape[2], query.shape[3]
        packed = torch.cat([part.squeeze(0).transpose(0, 1) for part in (query, key, value)], dim=1)
        packed = packed.to(self._dtype).reshape(tokens, -1)
        out = packed.new_empty((tokens, query.shape[1] * head_dim))
        self._backend.run(layer, packed, out)
        return out.view(1, tokens, query.shape[1], head_dim).to(query.dtype)


def _paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls, under the name registered below, instead of its own attention."""
    slot: AttentionSlot | None = getattr(module, _SLOT, None)
    if slot is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends without being a numbered layer; use another model"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return slot.attention.attend(layer, query, key, value, attention_mask, scaling, arguments), None


AttentionInterface.register(ATTENTION_NAME, _paged_attention)
