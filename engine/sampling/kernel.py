"""The CPU kernel that chooses tokens (`engine/kernels/csrc/sampling.cpp`), through ctypes."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from engine.grammar.filling import RowMasks
from engine.kernels.build import build_kernels
from engine.sampling.choose import Choice, Likeliest
from native.library import open_library

_DRAW = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p_log", np.float32),
        ("keys", np.uint32, 2),
    ]
)
"""pd::DrawParams."""


class KernelChooser:
    """Chooses on the CPU in C++. Raises `NativeUnavailable` where the kernel cannot be compiled or loaded."""

    def __init__(self, *, num_threads: int) -> None:
        library = open_library(build_kernels("sampling"))
        pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        self._greedy = library.pd_greedy
        self._greedy.argtypes = (pointer, i64, i64, pointer, i32)
        self._greedy.restype = None
        self._draw = library.pd_draw
        self._draw.argtypes = (pointer, i64, i64, pointer, pointer, pointer, pointer, i32)
        self._draw.restype = None
        self._scratch_floats = library.pd_scratch_floats
        self._scratch_floats.argtypes = (i64,)
        self._scratch_floats.restype = i64
        self._likeliest = library.pd_likeliest
        self._likeliest.argtypes = (pointer, i64, i64, i64, pointer, pointer, pointer, pointer, i32)
        self._likeliest.restype = None
        self._threads = num_threads
        self._scratch = np.empty(0, np.float32)

    def greedy(self, logits: torch.Tensor) -> npt.NDArray[np.int64]:
        rows, vocab_size = _checked(logits)
        tokens = np.empty(rows, np.int64)
        self._greedy(logits.data_ptr(), rows, vocab_size, tokens.ctypes.data, self._threads)
        return tokens

    def choose(self, logits: torch.Tensor, choice: Choice, masks: RowMasks | None = None) -> npt.NDArray[np.int64]:
        rows, vocab_size = _checked(logits)
        tokens = np.empty(rows, np.int64)
        draws = np.empty(rows, _DRAW)
        for name in ("temperature", "top_k", "top_p", "min_p_log", "keys"):
            draws[name] = getattr(choice, name)
        bits = np.zeros(rows, np.int64)
        if masks is not None:
            bits[masks.rows] = masks.addresses
        self._draw(
            logits.data_ptr(),
            rows,
            vocab_size,
            draws.ctypes.data,
            None if masks is None else bits.ctypes.data,
            self._room_for(vocab_size),
            tokens.ctypes.data,
            self._threads,
        )
        return tokens

    def likeliest(self, logits: torch.Tensor, count: int) -> Likeliest:
        rows, vocab_size = _checked(logits)
        found = Likeliest(
            log_sums=np.empty(rows, np.float64),
            tokens=np.empty((rows, count), np.int64),
            logits=np.empty((rows, count), np.float32),
        )
        self._likeliest(
            logits.data_ptr(),
            rows,
            vocab_size,
            count,
            self._room_for(vocab_size),
            found.log_sums.ctypes.data,
            found.tokens.ctypes.data,
            found.logits.ctypes.data,
            self._threads,
        )
        return found

    def _room_for(self, vocab_size: int) -> int:
        """The address of the scratch memory of all threads."""
        needed = self._threads * self._scratch_floats(vocab_size)
        if len(self._scratch) < needed:
            self._scratch = np.empty(needed, np.float32)
        return self._scratch.ctypes.data


def _checked(logits: torch.Tensor) -> tuple[int, int]:
    assert logits.dtype is torch.float32, "the kernel reads float32 logits"
    assert logits.device.type == "cpu", "the kernel reads logits in the CPU's memory"
    assert logits.is_contiguous(), "the kernel reads dense rows"
    rows, vocab_size = logits.shape
    return rows, vocab_size
