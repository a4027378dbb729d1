"""What moves between pools of unequal shape, against indexing: by ranks, heads, page sizes, and what cannot move."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_world import KVWorld

from transfer.grains import PoolGrains, page_grains
from transfer.layout import LayoutMismatch, cut_between, heads_of_rank, sources_of

ranks = st.sampled_from([1, 2, 4])
heads = st.sampled_from([1, 2, 4, 8])
page_sizes = st.sampled_from([1, 2, 3, 4, 6, 8])


@settings(max_examples=150, deadline=None)
@given(heads, ranks, ranks, page_sizes, page_sizes, st.integers(1, 30), st.data())
def test_every_rank_gets_its_kv_whatever_the_shapes(kv_heads, theirs, ours, their_page, our_page, tokens, data):
    """From every prefill rank exactly the heads that a decode rank needs, each once, of the tokens that there are."""
    world = KVWorld(kv_heads=kv_heads, tokens=tokens)
    givers = [world.pool(tp_rank=rank, tp_size=theirs, page_size=their_page, seed=rank) for rank in range(theirs)]
    for rank in range(ours):
        taker = world.pool(tp_rank=rank, tp_size=ours, page_size=our_page, seed=100 + rank, filled=False)
        before, written = taker.memory.copy(), np.zeros_like(taker.memory)
        for source in sources_of(taker.shape, peer_tp_size=theirs):
            giver = givers[source.rank]
            cut = cut_between(giver.shape, giver.page_bytes, taker.shape, taker.page_bytes)
            if cut is None:
                assert (giver.shape.kv_heads, their_page) == (taker.shape.kv_heads, our_page)
                for there, here in zip(giver.pages, taker.pages, strict=True):
                    taker.page(here)[...] = giver.page(there)
                    taker.page(here, written)[...] += 1
                continue
            assert cut.source.heads == len(source.heads)
            count = -(-tokens // cut.source.tokens)
            there = page_grains(giver.pages, cut.source.per_page)[:count]
            here = page_grains(taker.pages, cut.target.per_page)[:count]
            order = data.draw(st.permutations(range(count)))
            packed = np.empty(count * cut.source.grain_bytes, dtype=np.uint8)
            PoolGrains(giver.memory, cut.source).gather([there[i] for i in order], packed)
            PoolGrains(taker.memory, cut.target).scatter([here[i] for i in order], packed)
            PoolGrains(written, cut.target).scatter([here[i] for i in order], np.ones_like(packed))
            sums = PoolGrains(giver.memory, cut.source).checksums(there)
            assert sums == PoolGrains(taker.memory, cut.target).checksums(here)
        world.check(taker)
        assert written.max() == 1, "no byte is needed twice"
        assert np.array_equal(taker.memory[written == 0], before[written == 0])


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("theirs", [1, 2, 4])
@pytest.mark.parametrize("ours", [1, 2, 4])
def test_sources_give_each_head_once_and_replicas_share_the_work(kv_heads, theirs, ours):
    world = KVWorld(kv_heads=kv_heads, tokens=1)
    taken = dict.fromkeys(range(theirs), 0)
    for rank in range(ours):
        shape = world.pool(tp_rank=rank, tp_size=ours, page_size=1, seed=0).shape
        sources = sources_of(shape, peer_tp_size=theirs)
        given_heads = [head for source in sources for head in source.heads]
        assert given_heads == list(heads_of_rank(total_kv_heads=kv_heads, tp_rank=rank, tp_size=ours))
        for source in sources:
            held = heads_of_rank(total_kv_heads=kv_heads, tp_rank=source.rank, tp_size=theirs)
            assert set(source.heads) <= set(held)
            taken[source.rank] += len(source.heads)
        if theirs == ours:
            assert [source.rank for source in sources] == [rank], "equal sizes: rank to rank"
    asked = sorted(taken.values(), reverse=True)
    fair = max(kv_heads, ours) / min(theirs, max(kv_heads, ours))
    assert asked[0] <= fair, f"one rank gives more than its share: {taken}"


def test_equal_pools_move_whole_pages():
    world = KVWorld(kv_heads=4, tokens=1)
    pool = world.pool(tp_rank=1, tp_size=2, page_size=4, seed=0)
    assert cut_between(pool.shape, pool.page_bytes, pool.shape, pool.page_bytes) is None


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model", "another", "model is 'another' there and 'a model' here"),
        ("dtype", "bfloat16", "dtype is 'bfloat16' there and 'int32' here"),
        ("layers", 7, "layers is 7 there and 3 here"),
        ("head_dim", 9, "head_dim is 9 there and 2 here"),
        ("page_size", 0, "page_size is 0 there and 4 here"),
        ("kv_heads", 3, "kv_heads is 3, but of 4 KV heads rank 0 of 2 holds 2"),
        ("tp_size", 3, "4 KV heads cannot be shared out among 3 tensor-parallel ranks"),
        ("tp_rank", 2, "tensor-parallel rank 2 of 2"),
        ("tp_rank", 1, "rank 1 of 2 there holds the KV heads 2 to 3, rank 0 of 2 here the heads 0 to 1"),
    ],
)
def test_shapes_that_cannot_be_served_are_refused_with_both_values(field, value, words):
    pool = KVWorld(kv_heads=4, tokens=1).pool(tp_rank=0, tp_size=2, page_size=4, seed=0)
    theirs = msgspec.structs.replace(pool.shape, **{field: value})
    with pytest.raises(LayoutMismatch, match=words):
        cut_between(theirs, pool.page_bytes, pool.shape, pool.page_bytes)


def test_pages_of_other_sizes_than_their_shape_says_are_refused():
    pool = KVWorld(kv_heads=4, tokens=1).pool(tp_rank=0, tp_size=2, page_size=4, seed=0)
    for page_bytes in (0, pool.page_bytes - 1):
        with pytest.raises(LayoutMismatch, match="does not fit"):
            cut_between(pool.shape, page_bytes, pool.shape, pool.page_bytes)
    with pytest.raises(LayoutMismatch, match="not the same"):
        cut_between(pool.shape, 2 * pool.page_bytes, pool.shape, pool.page_bytes)
