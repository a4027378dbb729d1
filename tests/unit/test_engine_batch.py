"""Packing, the KV pool's layout, and configurations that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Piece, pack_batch
from engine.config import EngineConfig
from engine.kv_spec import KVCacheSpec, KVPool


def _spec(**more: Any) -> KVCacheSpec:
    sizes = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 8, "page_size": 4, "dtype": torch.bfloat16}
    return KVCacheSpec(**(sizes | more))


_PIECES = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(_PIECES, st.integers(1, 5))
def test_packing_equals_placing_each_token_by_itself(shapes: list[tuple[int, int, int]], page_size: int) -> None:
    pieces = []
    page = 100
    for number, (start, count, wants) in enumerate(shapes):
        end = start + count
        pages = np.arange(page, page + -(-end // page_size), dtype=np.int32)[::-1]
        page += len(pages)
        pieces.append(Piece(np.arange(end) + 1000 * number, pages, start, end, min(wants, count)))
    batch = pack_batch(pieces, page_size=page_size)
    at = 0
    rows = []
    for index, piece in enumerate(pieces):
        assert batch.query_start[index] == at
        for position in range(piece.start, piece.end):
            assert batch.token_ids[at] == piece.tokens[position]
            assert batch.positions[at] == position
            assert batch.slots[at] == piece.pages[position // page_size] * page_size + position % page_size
            at += 1
        rows += range(at - piece.num_logits, at)
        assert batch.kv_lens[index] == piece.end
        used = -(-piece.end // page_size)
        assert batch.page_table[index, :used].tolist() == piece.pages[:used].tolist()
        assert not batch.page_table[index, used:].any()
    assert batch.query_start[-1] == at == batch.num_tokens
    assert batch.logit_rows.tolist() == rows
    kinds = [batch.token_ids, batch.positions, batch.slots, batch.logit_rows]
    assert {tensor.dtype for tensor in kinds} == {torch.int64}
    assert {tensor.dtype for tensor in (batch.query_start, batch.kv_lens, batch.page_table)} == {torch.int32}


def test_a_page_is_one_span_of_the_buffer() -> None:
    spec = _spec()
    memory = bytearray(5 * spec.page_bytes + 7)
    pool = KVPool(spec=spec, num_pages=5, buffer=memoryview(memory))
    assert pool.data.shape == (5, 3, 2, 2, 4, 8)
    assert spec.page_bytes == 3 * 2 * 2 * 4 * 8 * 2
    pool.data[3] = 1.0
    changed = [index for index, byte in enumerate(memory) if byte]
    assert min(changed) >= 3 * spec.page_bytes
    assert max(changed) < 4 * spec.page_bytes
    pool.layer(2)[4] = 1.0
    assert pool.data[4, 2].eq(1).all()
    assert pool.data[4, :2].eq(0).all()


def test_layouts_are_told_apart() -> None:
    fingerprints = {
        _spec().layout_fingerprint("model"),
        _spec().layout_fingerprint("other"),
        _spec(dtype=torch.float16).layout_fingerprint("model"),
        _spec(num_kv_heads=4, head_dim=4).layout_fingerprint("model"),
        _spec(page_size=8).layout_fingerprint("model"),
    }
    assert len(fingerprints) == 5
    assert _spec().layout_fingerprint("model") in fingerprints


def test_memory_that_cannot_be_a_pool_is_refused() -> None:
    spec = _spec()
    with pytest.raises(ValueError, match=f"need {2 * spec.page_bytes} bytes, but the buffer has 100"):
        KVPool(spec=spec, num_pages=2, buffer=memoryview(bytearray(100)))
    with pytest.raises(ValueError, match="read-only"):
        KVPool(spec=spec, num_pages=1, buffer=memoryview(bytes(spec.page_bytes)))
    with pytest.raises(ValueError, match="on the CPU, not on 'meta'"):
        KVPool(spec=spec, num_pages=1, buffer=memoryview(bytearray(spec.page_bytes)), device="meta")
    with pytest.raises(ValueError, match="0 pages"):
        KVPool(spec=spec, num_pages=0)
    with pytest.raises(ValueError, match=r"torch\.int8"):
        _spec(dtype=torch.int8)
    with pytest.raises(ValueError, match="head_dim is 0"):
        _spec(head_dim=0)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("page_size", 0, "page_size is 0"),
        ("max_running_requests", 0, "max_running_requests is 0"),
        ("decode_headroom_tokens", -1, "decode_headroom_tokens is -1"),
        ("max_overtakes", -1, "max_overtakes is -1"),
        ("max_total_tokens", 31, "less than two pages of 16"),
        ("chunked_prefill_size", 15, "less than page_size 16"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_by_name(field: str, value: int, says: str) -> None:
    fields: dict[str, Any] = {"max_total_tokens": 1000, field: value}
    with pytest.raises(ValueError, match=says):
        EngineConfig(**fields)


def test_the_pool_has_whole_pages() -> None:
    assert EngineConfig(max_total_tokens=1000).num_pages == 62
