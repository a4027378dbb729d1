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


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """What one layer of a model hands to attention. Query and key are rotated already."""

    layer: int
    query: torch.Tensor
    """`[1, heads, tokens, head_dim]`."""
    key: torch.Tensor
    """`[1, kv_heads, tokens, head_dim]`, as the values."""
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float | None
    more: dict[str, Any]
    """Everything else the model passes."""


class Attention(Protocol):
    def attend(self, call: AttentionCall) -> torch.Tensor:
        """`[1, tokens, heads, head_dim]`."""


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

    def attend(self, call: AttentionCall) -> torch.Tensor:
        refuse_by_call(self._name, call.more, call.mask)
        query, key, value = call.query, call.key, call.value
        if value.shape != key.shape or query.shape[-1] != key.shape[-1]:
            raise UnsupportedModelError(
                f"{self._name} has queries, keys and values of unequal width ({query.shape[-1]}, {key.shape[-1]}, "
                f"{value.shape[-1]}), which KV pages here do not hold; use another model"
            )
        if call.layer in self.facts:
            raise UnsupportedModelError(f"{self._name} attends twice in layer {call.layer}; use another model")
        scale = query.shape[-1] ** -0.5 if call.scaling is None else float(call.scaling)
        self.facts[call.layer] = LayerFacts(
            num_heads=query.shape[1], num_kv_heads=key.shape[1], head_dim=query.shape[-1], scale=scale
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).contiguous()


class PagedAttention:
    """Attention over pages by a backend, which the decoder plans before each batch."""

    def __init__(self, backend: AttentionBackend, dtype: torch.dtype) -> None:
        self._backend = backend
        self._dtype = dtype

    def attend(self, call: AttentionCall) -> torch.Tensor:
        _, heads, tokens, head_dim = call.query.shape
        side_by_side = torch.cat([part[0].transpose(0, 1) for part in (call.query, call.key, call.value)], dim=1)
        qkv = side_by_side.to(self._dtype).reshape(tokens, -1)
        out = qkv.new_empty((tokens, heads * head_dim))
        self._backend.run(call.layer, qkv, out)
        return out.view(1, tokens, heads, head_dim).to(call.query.dtype)


def _attend_by_slot(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls, under the name registered below, instead of its own attention."""
    slot: AttentionSlot | None = getattr(module, _SLOT, None)
    if slot is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends without being a numbered layer; use another model"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    call = AttentionCall(
        layer=layer, query=query, key=key, value=value, mask=attention_mask, scaling=scaling, more=more
    )
    return slot.attention.attend(call), None


AttentionInterface.register(ATTENTION_NAME, _attend_by_slot)
