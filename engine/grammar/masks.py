"""Masks of the tokens that may come next, filled by a thread while the model computes.

`begin` names the constrained rows of a batch, `finish` waits for their masks; the engine thread calls both, in turn.
In between the constraints belong to the filling thread. The thread lives from the first `begin` to `close`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.grammar.constraint import Constraint

_BITS = 32


@dataclass(frozen=True)
class MaskedRow:
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


class MaskFiller:
    """Fills masks for one engine. Raises nothing of its own but what filling raised, at `finish`."""

    def __init__(self, *, vocab_size: int, timeout_s: float = 20.0) -> None:
        """A filling that takes `timeout_s` or more is given up."""
        self._words = -(-vocab_size // _BITS)
        self._timeout_s = timeout_s
        self._bits = torch.empty((0, self._words), dtype=torch.int32)
        self._orders: queue.SimpleQueue[Sequence[MaskedRow] | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[RowMasks | BaseException] = queue.SimpleQueue()
        self._under_way = False
        self._thread: threading.Thread | None = None

    def begin(self, rows: Sequence[MaskedRow]) -> None:
        """Start filling. Waits for what is under way, which nobody wants any more."""
        if self._under_way:  # of a batch that failed
            self._wait()
        if rows:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="grammar-masks", daemon=True)
                self._thread.start()
            self._orders.put(rows)
            self._under_way = True

    def finish(self) -> RowMasks | None:
        """The masks begun, or None where no row is constrained. They hold until the next `begin`."""
        if not self._under_way:
            return None
        filled = self._wait()
        if isinstance(filled, BaseException):
            raise filled
        return filled

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join(self._timeout_s)
            self._thread = None

    def _wait(self) -> RowMasks | BaseException:
        try:
            filled = self._filled.get(timeout=self._timeout_s)
        except queue.Empty:
            raise TimeoutError(f"masks were not filled within {self._timeout_s:g} s") from None
        self._under_way = False
        return filled

    # ---- on the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (rows := self._orders.get()) is not None:
            try:
                self._filled.put(self._fill(rows))
            except BaseException as error:
                self._filled.put(error)

    def _fill(self, rows: Sequence[MaskedRow]) -> RowMasks:
        if len(self._bits) < len(rows):
            self._bits = torch.empty((2 * len(rows), self._words), dtype=torch.int32)
        bits = self._bits[: len(rows)]
        for place, row in enumerate(rows):
            row.constraint.fill(bits, place)
            if row.avoided:
                _clear(bits[place].numpy(), row.avoided)
        return RowMasks(np.array([row.row for row in rows], np.int64), bits)


def _clear(bits: npt.NDArray[np.int32], tokens: Sequence[int]) -> None:
    """Take `tokens` out of a mask, unless that would leave none."""
    without = bits.copy()
    for token in tokens:
        without[token // _BITS] &= ~np.int32(np.uint32(1 << token % _BITS).view(np.int32))
    if without.any():
        bits[:] = without
