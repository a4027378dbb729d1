"""The numba kernel of `jit.py`: `engine/kernels/csrc/sampling.h` again, for machines without a C++ compiler."""

from __future__ import annotations

import numba
import numpy as np

_LEAST_NOISE = -3.2
_REACHES = np.array([6.0, 24.0, np.inf])


@numba.njit(cache=True, nogil=True)
def choose_rows(logits, temperature, top_k, top_p, min_p_log, keys, tokens):  # type: ignore[no-untyped-def]
    """Fill `tokens` int64 `[rows]` for `logits` float32 `[rows, vocab]`; -1 where no logit is finite.

    Only rows whose temperature is not 0 are filled; the rest is `Choice`, array by array.
    """
    scaled = np.empty(logits.shape[1], np.float32)
    for row in range(logits.shape[0]):
        if temperature[row] == 0:
            continue
        best = np.float32(-np.inf)
        for i in range(logits.shape[1]):
            value = logits[row, i] / temperature[row]
            scaled[i] = value if value == value else np.float32(-np.inf)
            best = max(best, scaled[i])
        if not np.isfinite(best):
            tokens[row] = -1
            continue
        edge = max(best + min_p_log[row], _edge(scaled, best, top_k[row], np.float64(top_p[row])))
        tokens[row] = _noisy_argmax(scaled, best, edge, keys[row, 0], keys[row, 1])


@numba.njit(cache=True, nogil=True)
def mask_rows(logits, rows, bits):  # type: ignore[no-untyped-def]
    """Row `rows[i]` of `logits` becomes -inf where `bits[i]` int32 `[words]` is 0."""
    for place in range(len(rows)):
        row = logits[rows[place]]
        for start in range(0, len(row), 32):
            word = bits[place, start // 32]
            if word != -1:
                for i in range(start, min(start + 32, len(row))):
                    if (word >> (i - start)) & 1 == 0:
                        row[i] = -np.inf


@numba.njit(cache=True, nogil=True)
def _edge(scaled, best, top_k, top_p):  # type: ignore[no-untyped-def]
    """The lowest value that top-k and top-p keep, searched first among the values near the best."""
    by_rank = 0 < top_k < len(scaled)
    if not by_rank and top_p >= 1:
        return np.float32(-np.inf)
    total = 0.0
    if not by_rank:
        for value in scaled:
            total += np.exp(np.float64(value) - best)
    for reach in _REACHES:
        near = np.sort(scaled[scaled >= best - reach])[::-1]
        if by_rank:
            if len(near) < top_k:
                continue
            near = near[near >= near[top_k - 1]]
            total = 0.0
            for value in near:
                total += np.exp(np.float64(value) - best)
        if top_p >= 1:
            return near[-1]
        above = 0.0
        for value in near:
            above += np.exp(np.float64(value) - best)
            if above >= top_p * total:
                return value
        if by_rank:
            return near[-1]
    return np.float32(-np.inf)


@numba.njit(cache=True, nogil=True)
def _noisy_argmax(scaled, best, edge, key0, key1):  # type: ignore[no-untyped-def]
    """Logarithms are taken only of noise that can win: to exceed k ln 2, it needs 1 - u below 2 to the -k."""
    mask = np.int64(0xFFFFFFFF)
    winning = np.float64(best) + _LEAST_NOISE
    winner = -1
    for token in range(len(scaled)):
        value = scaled[token]
        if value < edge:
            continue
        bits = np.int64(token) ^ key0
        bits = ((bits ^ (bits >> 17)) * 0xED5AD4BB) & mask
        bits = ((bits ^ (bits >> 11)) + key1) & mask
        bits = (bits * 0xAC4C1B51) & mask
        bits = ((bits ^ (bits >> 15)) * 0x31848BAB) & mask
        bits ^= bits >> 14
        halvings = (winning - value) * 1.4426950408889634 - 1e-3
        if halvings > 1 and (mask - bits) >> np.int64(33.0 - min(halvings, 32.0)) != 0:
            continue
        noisy = value - np.log(-np.log((bits + 0.5) * 2.0**-32))
        if noisy > winning:
            winning = noisy
            winner = token
    return winner
