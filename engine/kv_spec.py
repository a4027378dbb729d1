"""The shape of the KV memory, and the pool that holds it.

`KVCacheSpec` says what one page looks like; `KVPool` is the memory of all pages, made once when a replica starts and
given back when it ends. The pool knows nothing of who owns a page: that is `engine/page_allocator.py`.

The order is `[num_pages, layers, kv_heads, 2, page_size, head_dim]`. A page holds every layer, so that one page is one
contiguous span for the transfer layer, and so is a run of adjacent pages. Within a page a KV head of a layer is
contiguous too, K before V, so replicas of unequal tensor-parallel size can exchange slices.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """What one page of KV looks like. Raises ValueError for sizes below 1 or a dtype that is not floating point."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    """Tokens in a page."""
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but a KV page needs at least 1")
        if not self.dtype.is_floating_point:
            raise ValueError(f"KV is stored as {self.dtype}, but only floating point types can hold it")

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """`[layers, kv_heads, 2, page_size, head_dim]`."""
        return (self.num_layers, self.num_kv_heads, 2, self.page_size, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.page_size * self.head_dim * self.dtype.itemsize

    def layout_fingerprint(self, model_id: str) -> str:
        """Equal for two replicas exactly when their pages can be exchanged; 32 hexadecimal digits."""
        described = f"{model_id}|{self.dtype}|{'x'.join(map(str, self.page_shape))}|page,layer,head,kv,token,dim"
        return hashlib.sha256(described.encode()).hexdigest()[:32]


class KVPool:
    """The memory of `num_pages` pages; every page from 0 up is usable.

    With `buffer` (writable, CPU, for example a shared mapping that peers read) the pool is a view of it and never
    copies; without, it allocates zeroed memory on `device`. Raises ValueError when the buffer is too small, is
    read-only, or a buffer is given for a device that is not the CPU.
    """

    def __init__(
        self, *, spec: KVCacheSpec, num_pages: int, buffer: memoryview | None = None, device: str = "cpu"
    ) -> None:
        if num_pages < 1:
            raise ValueError(f"the KV pool has {num_pages} pages, but at least 1 is needed")
        self.spec = spec
        self.num_pages = num_pages
        if buffer is None:
            data = torch.zeros((num_pages, *spec.page_shape), dtype=spec.dtype, device=device)
        else:
            data = _view_of_buffer(buffer, spec, num_pages, device)
        self.data = data
        """`[num_pages, layers, kv_heads, 2, page_size, head_dim]`, contiguous."""

    def layer(self, index: int) -> torch.Tensor:
        """One layer's strided view `[num_pages, kv_heads, 2, page_size, head_dim]`."""
        return self.data[:, index]


def _view_of_buffer(buffer: memoryview, spec: KVCacheSpec, num_pages: int, device: str) -> torch.Tensor:
    if torch.device(device).type != "cpu":
        raise ValueError(f"a KV pool over a given buffer lives on the CPU, not on {device!r}")
    if buffer.readonly:
        raise ValueError("the buffer given for the KV pool is read-only; map it writable")
    needed = num_pages * spec.page_bytes
    if buffer.nbytes < needed:
        raise ValueError(
            f"{num_pages} KV pages of {spec.page_bytes} bytes need {needed} bytes, but the buffer has {buffer.nbytes}"
        )
    flat = torch.frombuffer(buffer, dtype=spec.dtype, count=needed // spec.dtype.itemsize)
    return flat.view(num_pages, *spec.page_shape)
