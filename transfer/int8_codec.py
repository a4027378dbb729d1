"""KV in 8 bits on the wire: one scale for each layer, head and K or V of a grain, and a signed byte for each number.

A number comes back no further from what it was than half a step of its block, which is 1/254 of the block's largest
magnitude (and what rounding to the stored type adds: at most 1/256 of the number itself in bfloat16). Zeros stay
zeros; infinities and NaNs become NaN. Blocks whose largest magnitude is below 4e-37 become zeros.

Use: make an `Int8Codec` once for a type (it loads, or on a machine's first start compiles, a small library) and ask it
for `encode` and `decode` of packed grains (`layout.py`). It has no state but the library; any number of threads may use
it, and other Python threads run meanwhile. Where no compiler is, numpy does the same, several times slower.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import numpy.typing as npt

from transfer.grains import Bytes
from transfer.layout import Grid
from transfer.native import I64, INT, PTR, load_c

_TYPES = {"float32": (0, 4), "bfloat16": (1, 2)}
_SCALE_BYTES = 4
_NOT_FINITE = -128


def coded_bytes(grid: Grid, dtype: str) -> int:
    """Of one grain in 8 bits."""
    return _blocks(grid) * _SCALE_BYTES + grid.grain_bytes // _TYPES[dtype][1]


def _blocks(grid: Grid) -> int:
    return grid.layers * grid.heads * 2


class Int8Codec:
    """For KV stored as `dtype`. Raises `ValueError` for one that it cannot encode."""

    def __init__(self, dtype: str, *, native: bool = True) -> None:
        if dtype not in _TYPES:
            raise ValueError(
                f"KV is stored as {dtype}, which cannot move in 8 bits; only {' and '.join(_TYPES)} can: "
                "set wire_dtype: auto"
            )
        self.dtype = dtype
        self._type, _ = _TYPES[dtype]
        self._library = _library() if native else None

    @property
    def is_native(self) -> bool:
        return self._library is not None

    def encode(self, grid: Grid, packed: Bytes, coded: Bytes) -> None:
        """One packed grain of `grid` into `coded`, uint8 [coded_bytes]."""
        blocks, scales, codes = self._parts(grid, coded)
        assert packed.nbytes == grid.grain_bytes
        assert packed.flags.c_contiguous
        if self._library is not None:
            self._library.pd_encode_int8(
                packed.ctypes.data, blocks, codes.shape[1], self._type, scales.ctypes.data, codes.ctypes.data
            )
            return
        values = self._as_floats(packed).reshape(blocks, -1)
        finite = np.isfinite(values)
        values = np.where(finite, values, np.float32(0))
        most = np.abs(values).max(axis=1)
        with np.errstate(divide="ignore", over="ignore"):
            inverse, step = np.float32(127) / most, most / np.float32(127)
            step = np.where(np.isfinite(step * np.float32(127)), step, np.nextafter(step, np.float32(0)))
        usable = np.isfinite(inverse)
        scales[:] = np.where(usable, step, 0)
        scaled = values * np.where(usable, inverse, np.float32(0))[:, None]
        codes[:] = np.where(finite, np.rint(scaled), np.float32(_NOT_FINITE))

    def decode(self, grid: Grid, coded: Bytes, packed: Bytes) -> None:
        """What `encode` made, as near as it can be had, into `packed`, uint8 [grain_bytes]."""
        blocks, scales, codes = self._parts(grid, coded)
        assert packed.nbytes == grid.grain_bytes
        assert packed.flags.c_contiguous
        if self._library is not None:
            self._library.pd_decode_int8(
                scales.ctypes.data, codes.ctypes.data, blocks, codes.shape[1], self._type, packed.ctypes.data
            )
            return
        values = np.where(codes == _NOT_FINITE, np.float32(np.nan), codes * scales[:, None])
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        if self.dtype == "bfloat16":
            packed.view(np.uint16)[:] = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).reshape(-1)
        else:
            packed.view(np.uint32)[:] = bits.reshape(-1)

    def _parts(self, grid: Grid, coded: Bytes) -> tuple[int, npt.NDArray[np.float32], npt.NDArray[np.int8]]:
        """Blocks, scales `[blocks]` and codes `[blocks, numbers]` in `coded`."""
        blocks = _blocks(grid)
        assert coded.nbytes == coded_bytes(grid, self.dtype)
        assert coded.flags.c_contiguous
        scales, codes = coded[: blocks * _SCALE_BYTES], coded[blocks * _SCALE_BYTES :]
        return blocks, scales.view(np.float32), codes.view(np.int8).reshape(blocks, -1)

    def _as_floats(self, packed: Bytes) -> npt.NDArray[np.float32]:
        if self.dtype == "bfloat16":
            return (packed.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return packed.view(np.float32)


@functools.cache  # a loaded library is its process's anyway
def _library() -> ctypes.CDLL | None:
    functions = {
        "pd_encode_int8": (None, (PTR, I64, I64, INT, PTR, PTR)),
        "pd_decode_int8": (None, (PTR, PTR, I64, I64, INT, PTR)),
    }
    return load_c("int8_codec", functions, without="KV is quantised by numpy, which is slower")
