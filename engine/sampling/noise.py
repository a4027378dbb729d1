"""The randomness of sampling: Gumbel noise as a pure function of (seed, choice, position, token).

No generator and no state, so any replica can go on with a sequence, and a row's noise does not depend on the rows
beside it. Seed, choice and position are mixed into two 32-bit keys (finaliser of Steele et al.'s SplitMix64); keys and
token into 32 uniform bits (Wellons' `triple32` permutation with the second key added inside). `argmax(x + g)` with
Gumbel noise `g` draws from softmax(x) (Gumbel 1954; see also Maddison et al. 2014).

The noise is taken in float64, where implementations of the logarithm agree to the last bits, so that the CPU kernel
(`engine/kernels/csrc/sampling.h`) and torch on any device choose the same tokens.
"""

from __future__ import annotations

import torch

_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix64(value: int) -> int:
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def sequence_key(seed: int, choice: int) -> int:
    """64 bits for one choice of one request."""
    return _mix64(_mix64(seed + _GOLDEN) + (choice + 1) * _GOLDEN)


def position_key(sequence: int, position: int) -> tuple[int, int]:
    """Two 32-bit keys for the token at `position` of the sequence."""
    key = _mix64(sequence + (position + 1) * _GOLDEN)
    return key & _MASK32, key >> 32


def gumbel_noise(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """float64 `[rows, vocab_size]` from `keys` int64 `[rows, 2]`."""
    bits = torch.arange(vocab_size, dtype=torch.int64, device=keys.device)[None, :] ^ keys[:, :1]
    bits = ((bits ^ (bits >> 17)) * 0xED5AD4BB) & _MASK32
    bits = ((bits ^ (bits >> 11)) + keys[:, 1:]) & _MASK32
    bits = (bits * 0xAC4C1B51) & _MASK32
    bits = ((bits ^ (bits >> 15)) * 0x31848BAB) & _MASK32
    bits ^= bits >> 14
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))
