"""The masks of one batch while they are being made.

A `Filling` is made by the engine thread and filled by one filling thread, row by row. The engine thread may abandon it
at any time: the filling thread then begins no further row, and what the engine reads of it was written before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from engine.grammar.constraint import MASK_BITS, Constraint

_LOOKS = 2
"""Waits that a row must outlast to be too slow: the time in which the whole process was stopped can spoil one."""


class MaskedRow(msgspec.Struct, frozen=True):
    """One constrained row of a batch."""

    row: int
    """Its row of logits."""
    constraint: Constraint
    avoided: Sequence[int] = ()
    """Tokens that may not come unless nothing else can: stop tokens before their time."""


@dataclass(frozen=True)
class RowMasks:
    """Bit `t % 32` of `bits[i, t // 32]` says whether token `t` may come in row `rows[i]`; the other rows are free."""

    rows: npt.NDArray[np.int64]
    bits: torch.Tensor
    """int32 `[len(rows), ceil(vocab / 32)]`, on the CPU."""
    addresses: npt.NDArray[np.int64]
    """Of each row's words."""

    @classmethod
    def of(cls, rows: Sequence[int], bits: torch.Tensor) -> RowMasks:
        """`bits` are dense."""
        assert bits.dtype is torch.int32, "masks have words of 32 bits"
        assert bits.is_contiguous(), "masks are read by their addresses"
        places = np.arange(len(rows)) * bits.stride(0) * bits.element_size()
        return cls(np.array(rows, np.int64), bits, bits.data_ptr() + places)

    def without_any(self) -> list[int]:
        """The rows in which no token may come."""
        return [int(row) for row, bits in zip(self.rows, self.bits.numpy(), strict=True) if not bits.any()]


class Filling:
    """Masks of `rows`, from place `first` on, into `bits` int32 `[rows or more, words]`."""

    def __init__(self, rows: Sequence[MaskedRow], bits: torch.Tensor, *, first: int = 0) -> None:
        self.rows = rows
        self.bits = bits
        self.error: BaseException | None = None
        """What went wrong that is no row's grammar, once it is finished."""
        self.seconds = 0.0
        """What it took, once it is finished."""
        self.masks: RowMasks | None = None
        """Once it is finished."""
        self._finished = threading.Lock()
        """Free once it is: an event of Python's own costs a step more than the masks do."""
        self._finished.acquire()
        self._lock = threading.Lock()
        self._first = self._next = first
        self._abandoned = False

    def run(self) -> None:
        """On the filling thread: fill all rows, unless abandoned."""
        began = time.perf_counter()
        words = self.bits.numpy()
        try:
            while (place := self._begin_row()) is not None:
                row = self.rows[place]
                row.constraint.fill(self.bits, place)
                if row.avoided:
                    _take_out(words[place], row.avoided)
            self.masks = RowMasks.of([row.row for row in self.rows], self.bits[: len(self.rows)])
        except BaseException as error:
            self.error = error
        self.seconds = time.perf_counter() - began
        self._finished.release()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is finished, once it is or the same row has been under way for `timeout_s`. Ask no more after
        True."""
        looks, seen = 0, -1
        while not self._finished.acquire(timeout=timeout_s / _LOOKS if looks else 0):
            with self._lock:
                looks, seen = (looks + 1 if self._next == seen else 1), self._next
            if looks > _LOOKS:
                return False
        return True

    def abandon(self) -> int | None:
        """Begin no further row; which is under way, if any was begun."""
        with self._lock:
            self._abandoned = True
            return self._next - 1 if self._next > self._first else None

    def _begin_row(self) -> int | None:
        with self._lock:
            if self._abandoned or self._next == len(self.rows):
                return None
            self._next += 1
            return self._next - 1


def _take_out(words: npt.NDArray[np.int32], tokens: Sequence[int]) -> None:
    """Take `tokens` out of a mask, unless that would leave none."""
    there = [token for token in tokens if words[token // MASK_BITS] >> (token % MASK_BITS) & 1]
    if not there:
        return
    without = words.copy()
    for token in there:
        without[token // MASK_BITS] &= ~np.int32(np.uint32(1 << token % MASK_BITS).view(np.int32))
    if without.any():
        words[:] = without
