"""Which parts of a peer's pages belong where in ours, when the two pools have different shapes.

Pools differ by tensor-parallel rank (each holds some of the KV heads) and by page size. What moves then is not pages
but *grains*: as many tokens as divide both page sizes, of the heads that both ranks hold, over all layers, K and V. A
grain is named by its place in a pool, page by page; packed, it is `[layers, heads, 2, tokens, head_dim]`.

Pure functions over shapes; `grains.py` moves the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from protocol.handshake import PoolShape


class LayoutMismatch(ValueError):
    """No part of one pool's pages means anything in the other."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One pool seen as grains: its pages, `[layers, kv_heads, 2, page_size, row_bytes]`, cut into runs of `tokens`
    tokens of the heads from `first_head` on."""

    layers: int
    kv_heads: int
    page_size: int
    row_bytes: int
    """Of one head's K (or V) of one token."""
    tokens: int
    first_head: int
    heads: int

    @property
    def page_bytes(self) -> int:
        return self.layers * self.kv_heads * 2 * self.page_size * self.row_bytes

    @property
    def grain_bytes(self) -> int:
        return self.layers * self.heads * 2 * self.tokens * self.row_bytes

    @property
    def per_page(self) -> int:
        """Grains in a page; grain `g` lies in page `g // per_page`."""
        return self.page_size // self.tokens


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Grains of `source`, a peer's pool, are grains of `target`, ours."""

    source: Grid
    target: Grid

    @property
    def counted_tokens(self) -> int:
        """Tokens in what jobs count where the pages differ in size; 0 where they count pages."""
        return 0 if self.source.page_size == self.target.page_size else self.target.tokens


@dataclass(frozen=True, kw_only=True)
class Source:
    """What one rank of a peer gives: `heads` by their number in the model."""

    rank: int
    heads: range


def grain_tokens(source_page_size: int, target_page_size: int) -> int:
    """Tokens in a grain between pages of these two sizes."""
    return math.gcd(source_page_size, target_page_size)


def heads_of_rank(*, total_kv_heads: int, tp_rank: int, tp_size: int) -> range:
    """The KV heads that a rank holds: its share, or one that it has in common with its neighbours when there are fewer
    heads than ranks. Raises `LayoutMismatch` when they cannot be shared out evenly."""
    if not 0 <= tp_rank < tp_size:
        raise LayoutMismatch(f"tensor-parallel rank {tp_rank} of {tp_size}: ranks count from 0 to {tp_size - 1}")
    if total_kv_heads < 1 or (total_kv_heads % tp_size and tp_size % total_kv_heads):
        raise LayoutMismatch(
            f"{total_kv_heads} KV heads cannot be shared out among {tp_size} tensor-parallel ranks; "
            "one number must divide the other"
        )
    share = max(1, total_kv_heads // tp_size)
    first = tp_rank * total_kv_heads // tp_size
    return range(first, first + share)


def sources_of(shape: PoolShape, *, peer_tp_size: int) -> list[Source]:
    """From which ranks of a peer of `peer_tp_size` ranks the pool of `shape` takes which heads: each head once.

    Where several of the peer's ranks hold a head, those of ours that need it are spread over them.
    """
    ranks_per_head = max(1, peer_tp_size // shape.total_kv_heads)
    takers = max(1, shape.tp_size // shape.total_kv_heads)
    replica = shape.tp_rank % takers * ranks_per_head // takers
    found: list[Source] = []
    for head in _checked_heads(shape):
        rank = head * peer_tp_size // shape.total_kv_heads + replica
        theirs = heads_of_rank(total_kv_heads=shape.total_kv_heads, tp_rank=rank, tp_size=peer_tp_size)
        assert head in theirs
        if found and found[-1].rank == rank:
            found[-1] = Source(rank=rank, heads=range(found[-1].heads.start, head + 1))
        else:
            found.append(Source(rank=rank, heads=range(head, head + 1)))
    return found


def whole_grid(shape: PoolShape, *, page_bytes: int, tokens: int) -> Grid:
    """A pool of `shape` cut into grains of all its heads. Raises `LayoutMismatch` for what does not divide."""
    return _grid(shape, page_bytes=page_bytes, tokens=tokens, heads=_checked_heads(shape))


def cut_between(theirs: PoolShape, their_page_bytes: int, ours: PoolShape, our_page_bytes: int) -> Cut | None:
    """How our pool takes from theirs: None when pages are interchangeable as they are.

    Raises `LayoutMismatch` when they hold different models or types, or no head in common.
    """
    for name in ("model", "dtype", "layers", "head_dim", "total_kv_heads"):
        if getattr(theirs, name) != getattr(ours, name):
            raise LayoutMismatch(
                f"{name} is {getattr(theirs, name)!r} there and {getattr(ours, name)!r} here; run the same model and "
                "dtype in all pools"
            )
    if min(theirs.page_size, ours.page_size) < 1:
        raise LayoutMismatch(f"page_size is {theirs.page_size} there and {ours.page_size} here; it must be positive")
    source_heads, target_heads = _checked_heads(theirs), _checked_heads(ours)
    common = range(max(source_heads.start, target_heads.start), min(source_heads.stop, target_heads.stop))
    if not common:
        raise LayoutMismatch(
            f"rank {theirs.tp_rank} of {theirs.tp_size} there holds the KV heads {_named(source_heads)}, rank "
            f"{ours.tp_rank} of {ours.tp_size} here the heads {_named(target_heads)}: attach a rank that shares some"
        )
    tokens = grain_tokens(theirs.page_size, ours.page_size)
    cut = Cut(
        source=_grid(theirs, page_bytes=their_page_bytes, tokens=tokens, heads=common),
        target=_grid(ours, page_bytes=our_page_bytes, tokens=tokens, heads=common),
    )
    if cut.source.row_bytes != cut.target.row_bytes:
        raise LayoutMismatch(
            f"pages have {their_page_bytes} bytes there and {our_page_bytes} here, which is not the same {ours.dtype}"
        )
    return None if cut.source == cut.target and cut.source.grain_bytes == our_page_bytes else cut


def _checked_heads(shape: PoolShape) -> range:
    heads = heads_of_rank(total_kv_heads=shape.total_kv_heads, tp_rank=shape.tp_rank, tp_size=shape.tp_size)
    if shape.kv_heads != len(heads):
        raise LayoutMismatch(
            f"kv_heads is {shape.kv_heads}, but of {shape.total_kv_heads} KV heads rank {shape.tp_rank} of "
            f"{shape.tp_size} holds {len(heads)}"
        )
    return heads


def _grid(shape: PoolShape, *, page_bytes: int, tokens: int, heads: range) -> Grid:
    rows = shape.layers * shape.kv_heads * 2 * shape.page_size
    if rows <= 0 or page_bytes <= 0 or page_bytes % rows or tokens < 1 or shape.page_size % tokens:
        raise LayoutMismatch(f"a page of {page_bytes} bytes in grains of {tokens} tokens does not fit {shape}")
    return Grid(
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        page_size=shape.page_size,
        row_bytes=page_bytes // rows,
        tokens=tokens,
        first_head=heads.start - shape.tp_rank * shape.total_kv_heads // shape.tp_size,
        heads=len(heads),
    )


def _named(heads: range) -> str:
    return f"{heads.start} to {heads.stop - 1}"
