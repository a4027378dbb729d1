"""The attention backend: what a model asks of a device.

Lifecycle: made once per model; `plan` once per batch, before its first layer, does everything that is the same for all
layers (dividing the work, moving indices to the device); `run` once per layer writes the batch's K and V into their
pages and attends. Only the engine thread calls it. The division into plan and run is flashinfer's idea.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.batch import Batch
from engine.kv_spec import KVPool


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionShape:
    """What all attention layers of a model have in common."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float
    """Factor on the scores, usually head_dim ** -0.5."""
    rope: torch.Tensor | None
    """float32 `[positions, head_dim]`: cosines, then sines; None when q and k arrive already rotated."""
    norm_eps: float = 0.0
    """Of the norm over heads of q and k, where a layer has one."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")
        if self.head_dim % 2 and self.rope is not None:
            raise ValueError(f"head_dim is {self.head_dim}, but rotary embeddings need it to be even")

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


class AttentionBackend(Protocol):
    def plan(self, batch: Batch, pool: KVPool) -> None:
        """Prepare for the layers of one batch. Batch and pool must stay alive and unchanged until the last `run`."""

    def run(
        self,
        layer: int,
        qkv: torch.Tensor,
        out: torch.Tensor,
        *,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
    ) -> None:
        """Attend causally, each token to its own sequence.

        `qkv [tokens, (heads + 2 kv_heads) * head_dim]` holds queries, keys and values side by side and may be
        overwritten; `out [tokens, heads * head_dim]`; the norms' weights `[head_dim]`. Heads are normalised (where
        there are norms), then rotated (where the shape has a table), then K and V go to the batch's slots.
        """
