"""Prefill of m ranks to decode of n ranks, each rank a process with a pool of its own shape, over real transports."""

from __future__ import annotations

import itertools

import pytest
from kv_world import HEAD_DIM, LAYERS
from rank_process import Give, Given, Hash, Rank, RankOrder, Take, TakeFrom, Taken, make_pool
from transfer_pools import closing

from transfer.layout import grain_tokens, sources_of

TOKENS = 100
"""The last page is part-filled, whichever its size."""
_boots = itertools.count(1)


@pytest.fixture(scope="module")
def ranks():
    with closing(*(Rank() for _ in range(8))) as processes:
        yield processes[:4], processes[4:]


@pytest.mark.parametrize("way", ["shm", "tcp", "tcp in 8 bits"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("theirs", [1, 2, 4])
@pytest.mark.parametrize("ours", [1, 2, 4])
def test_every_rank_takes_exactly_its_kv(ranks, way, kv_heads, theirs, ours):
    """With equal page sizes, and from small to large pages and back."""
    (givers, takers), transport, int8 = ranks, way[:3], way.endswith("8 bits")
    for their_page, our_page in ((16, 16), (16, 64), (64, 16)):
        given = give(givers[:theirs], kv_heads, their_page, int8=int8)
        orders = [order(kv_heads, rank, ours, our_page, int8=int8) for rank in range(ours)]
        for taker, rank in zip(takers, orders, strict=False):
            taker.order(Take(rank, transport, sources(givers, given, rank)))
        heads = max(1, kv_heads // ours)
        tokens = grain_tokens(their_page, our_page)
        needed = -(-TOKENS // tokens) * tokens * heads * 2 * LAYERS * HEAD_DIM * 4
        for taker in takers[:ours]:
            taken = taker.answer(Taken)
            assert not taken.errors
            assert taken.bytes == needed
            assert set(taken.transports) == {transport}


def order(kv_heads: int, rank: int, size: int, page_size: int, *, int8: bool) -> RankOrder:
    return RankOrder(kv_heads, TOKENS, rank, size, page_size, next(_boots), int8)


def give(givers: list[Rank], kv_heads: int, page_size: int, *, int8: bool) -> list[Given]:
    for rank, giver in enumerate(givers):
        giver.order(Give(order(kv_heads, rank, len(givers), page_size, int8=int8)))
    return [giver.answer(Given) for giver in givers]


def sources(givers: list[Rank], given: list[Given], rank: RankOrder) -> list[TakeFrom]:
    """What a decode rank is told: whom to take from, and what the KV must hash to."""
    pool = make_pool(rank, filled=False)
    found = []
    for source in sources_of(pool.shape, peer_tp_size=len(given)):
        givers[source.rank].order(Hash(pool.shape, pool.page_bytes))
        found.append(TakeFrom(given[source.rank], givers[source.rank].answer(list[int])))
    return found
