"""Head norm, rotation and the write of K and V into pages, as torch operations, for backends that do not fuse them."""

from __future__ import annotations

import torch

from engine.attention.backend import AttentionShape


def split_and_rotate(
    shape: AttentionShape,
    qkv: torch.Tensor,
    positions: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`q [tokens, heads, head_dim]`, `k` and `v [tokens, kv_heads, head_dim]` of `qkv`, in its type."""
    heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
    q, k, v = torch.split(heads, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
    return _rotate(shape, q, positions, q_norm), _rotate(shape, k, positions, k_norm), v


def write_pages(kv: torch.Tensor, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """`k, v [tokens, kv_heads, head_dim]` into one layer's `kv [pages, kv_heads, 2, page_size, head_dim]`."""
    page_size = kv.shape[3]
    pages, offsets = slots // page_size, slots % page_size
    kv[pages, :, 0, offsets] = k
    kv[pages, :, 1, offsets] = v


def _rotate(
    shape: AttentionShape, heads: torch.Tensor, positions: torch.Tensor, norm: torch.Tensor | None
) -> torch.Tensor:
    x = heads.float()
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.norm_eps) * norm.float()
    if shape.rope is not None:
        cosine, sine = shape.rope[positions].unsqueeze(1).chunk(2, dim=-1)
        low, high = x.chunk(2, dim=-1)
        x = torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)
    return x.to(heads.dtype)
