"""The numba kernel of `jit.py`: online softmax over tiles of keys, widened to float32 once per block of queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import overload

_TILE_KEYS = 64
# Sums may be reordered (for vector units), but infinities and not-a-numbers keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


def _widen(element: Any, table: Any) -> Any:
    """float32 of a stored element; numba compiles one of the two below."""
    return table[element] if table.size else element


@overload(_widen, strict=False)  # type: ignore[untyped-decorator]
def _widen_overload(element: Any, table: Any) -> Callable[..., Any]:
    if isinstance(element, types.Integer):
        return lambda element, table: table[element]
    return lambda element, table: element


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def attend_blocks(blocks, queries, stored, table, page_table, scale, out):  # type: ignore[no-untyped-def]
    """Attention of some blocks of query tokens, each for the heads of one KV head.

    blocks int32 [n, 5]: sequence, first token, end token, keys that the last of them sees, KV head
    queries, out float32 [tokens, heads, head_dim]; stored [pages, kv_heads, 2, page_size, head_dim], float32 or bits
    that `table` [65536] widens; page_table int32 [sequences, max_pages].
    """
    head_dim = queries.shape[2]
    group = queries.shape[1] // stored.shape[1]
    page_size = stored.shape[3]
    keys = np.empty((_TILE_KEYS, head_dim), np.float32)
    values = np.empty((_TILE_KEYS, head_dim), np.float32)
    scores = np.empty(_TILE_KEYS, np.float32)
    for b in range(blocks.shape[0]):
        sequence, begin, end, all_keys, kv_head = blocks[b]
        rows = (end - begin) * group
        sums = np.zeros((rows, head_dim), np.float32)
        weight = np.zeros(rows, np.float32)
        best = np.full(rows, -np.inf, np.float32)
        for start in range(0, all_keys, _TILE_KEYS):
            count = min(_TILE_KEYS, all_keys - start)
            for i in range(count):
                page = page_table[sequence, (start + i) // page_size]
                offset = (start + i) % page_size
                for d in range(head_dim):
                    keys[i, d] = _widen(stored[page, kv_head, 0, offset, d], table)
                    values[i, d] = _widen(stored[page, kv_head, 1, offset, d], table)
            for row in range(rows):
                token = begin + row // group
                query = queries[token, kv_head * group + row % group]
                visible = min(count, all_keys - (end - 1 - token) - start)
                if visible <= 0:
                    continue
                top = best[row]
                for i in range(visible):
                    score = np.float32(0)
                    for d in range(head_dim):
                        score += query[d] * keys[i, d]
                    scores[i] = score * np.float32(scale)
                    top = max(top, scores[i])
                keep = np.exp(best[row] - top)
                best[row] = top
                weight[row] *= keep
                for d in range(head_dim):
                    sums[row, d] *= keep
                for i in range(visible):
                    p = np.exp(scores[i] - top)
                    weight[row] += p
                    for d in range(head_dim):
                        sums[row, d] += p * values[i, d]
        for row in range(rows):
            for d in range(head_dim):
                out[begin + row // group, kv_head * group + row % group, d] = sums[row, d] / weight[row]
