"""Masks of the tokens that may come next, filled by a thread while the model computes.

`begin` names the constrained rows of a batch, `finish` waits for their masks; the engine thread calls both, in turn.
In between the constraints belong to the filling thread, which lives from the first `begin` to `close`. A row whose mask
takes too long is given up, and with it the thread that is at it, which nothing can interrupt: another takes its place
and fills the rows after it, so that the other sequences of the batch go on.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.grammar.constraint import MASK_BITS
from engine.grammar.filling import Filling, MaskedRow, RowMasks

__all__ = ["MaskCounters", "MaskFiller", "MaskedRow", "RowMasks"]

_Orders = queue.SimpleQueue[Filling | None]


@dataclass
class MaskCounters:
    """Of one filler, since it was made; changed by the engine thread, read a copy elsewhere."""

    masks: int = 0
    fill_seconds: float = 0.0
    """That its thread was at them."""
    wait_seconds: float = 0.0
    """That steps waited for them."""
    given_up: int = 0
    """Masks that took too long."""


class MaskFiller:
    """Fills masks for one engine. What goes wrong with one row's grammar ends that row's; anything else is raised by
    `finish`."""

    def __init__(self, *, vocab_size: int, timeout_s: float = 2.0) -> None:
        """A row whose mask takes `timeout_s` or more is given up."""
        self._words = -(-vocab_size // MASK_BITS)
        self._timeout_s = timeout_s
        self._bits = torch.empty((0, self._words), dtype=torch.int32)
        self._room = 0
        """Rows of `_bits`. A step must not ask the tensor: torch's code has left the cache by then, so that one call
        takes longer than all the rest of `begin`."""
        self._orders: _Orders = queue.SimpleQueue()
        self._filling: Filling | None = None
        self._thread: threading.Thread | None = None
        self.counters = MaskCounters()

    def begin(self, rows: Sequence[MaskedRow]) -> None:
        """Start filling. Waits for what is under way, which nobody wants any more."""
        forgotten, self._filling = self._filling, None
        if forgotten is not None:  # of a batch that failed
            self._complete(forgotten)
        if not rows:
            return
        if self._thread is None:
            self._start_thread()
        if self._room < len(rows):
            self._room = 2 * len(rows)
            self._bits = torch.empty((self._room, self._words), dtype=torch.int32)
        self._filling = Filling(rows, self._bits)
        self._orders.put(self._filling)

    def finish(self) -> RowMasks | None:
        """The masks begun, or None where no row is constrained. They hold until the next `begin`."""
        filling, self._filling = self._filling, None
        if filling is None:
            return None
        began = time.perf_counter()
        filling = self._complete(filling)
        self.counters.masks += len(filling.rows)
        self.counters.fill_seconds += filling.seconds
        self.counters.wait_seconds += time.perf_counter() - began
        if filling.error is not None:
            raise filling.error
        return filling.masks

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join(self._timeout_s)
            self._thread = None

    # ---- inside -------------------------------------------------------------------------------------------------

    def _complete(self, filling: Filling) -> Filling:
        """The same, or what took its place, with every row filled or given up."""
        while not filling.wait(self._timeout_s):
            filling = self._without_slow_row(filling)
        return filling

    def _without_slow_row(self, filling: Filling) -> Filling:
        """Give up the row under way and have another thread fill those after it."""
        slow = filling.abandon()
        if slow is None:
            raise TimeoutError(f"no mask was begun within {self._timeout_s:g} s")
        filling.rows[slow].constraint.give_up(
            f"finding what the grammar allows next took more than {self._timeout_s:g} s; make it less ambiguous"
        )
        # The abandoned thread may still write into its own.
        bits = self._bits = torch.empty_like(self._bits)
        bits[:slow] = filling.bits[:slow]
        bits[slow] = -1
        self._orders.put(None)  # the abandoned thread ends when it comes back
        self._start_thread()
        rest = Filling(filling.rows, bits, first=slow + 1)
        self._orders.put(rest)
        self.counters.given_up += 1
        return rest

    def _start_thread(self) -> None:
        self._orders = queue.SimpleQueue()
        self._thread = threading.Thread(target=_fill_all, args=(self._orders,), name="grammar-masks", daemon=True)
        self._thread.start()


def _fill_all(orders: _Orders) -> None:
    while (filling := orders.get()) is not None:
        filling.run()
