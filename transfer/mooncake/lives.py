"""The lives of the library at the fetching end: one at present, and retired ones that copies still use.

Lifecycle: the constructor starts the first and waits until it runs. A copy takes a `lease` of the present one and gives
it back. When that one has been retired, another is started at once, which later copies wait for; after a start that
failed there is none for `retry_s`. A retired one is closed with its last lease, and `close` ends the present one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transfer.io_loop import IoLoop
from transfer.jobs import PageCopy
from transfer.landing import CopyStopped
from transfer.mooncake.bounce import START_S, Bounce, BounceState
from transfer.mooncake.messages import DoorAddress
from transfer.transport import TransferTimings


class ReadFailed(Exception):
    """The library did not bring what it was asked for."""


class Lives:
    """`changed` guards every bounce, and is notified whenever somebody may have something to wait for no longer.

    Raises `MooncakeUnavailable` when the library cannot be had.
    """

    def __init__(
        self,
        loop: IoLoop,
        *,
        ib_device: str,
        num_slots: int,
        block_bytes: int,
        changed: threading.Condition,
        clock: Callable[[], float],
        timings: TransferTimings,
    ) -> None:
        self._loop = loop
        self._ib_device = ib_device
        self._num_slots = num_slots
        self._block_bytes = block_bytes
        self._changed = changed
        self._clock = clock
        self._timings = timings
        self._retry_at = float("-inf")
        self._present = self._begin()
        try:
            self._present.wait_ready()
        except Exception:
            self._present.close(timeout_s=timings.close_s)
            raise
        self._present.watch()

    @property
    def pid(self) -> int:
        """Of the library's process at present."""
        return self._present.pid

    def open(self, address: DoorAddress) -> None:
        """Begin first contact with a peer, if the library is at hand."""
        with self._changed:
            if self._present.state is BounceState.READY:
                self._present.open(address)

    @contextmanager
    def lease(self, copy: PageCopy) -> Iterator[Bounce]:
        """The present life, for `copy`. Raises `ReadFailed` when there is none, and `CopyStopped`."""
        with self._changed:
            if self._is_over and self._clock() < self._retry_at:
                raise ReadFailed(self._present.error)
            self._replace_if_over()
            bounce = self._present
            self.wait(copy, bounce, lambda: bounce.state is not BounceState.STARTING, seconds=START_S)
            if bounce.state is not BounceState.READY:
                self._retry_at = self._clock() + self._timings.retry_s
                raise ReadFailed(bounce.error)
            bounce.leases += 1
        try:
            yield bounce
        finally:
            with self._changed:
                bounce.leases -= 1
            self._close_unused(bounce)
            with self._changed:
                self._replace_if_over()

    def wait(self, copy: PageCopy, bounce: Bounce, until: Callable[[], bool], *, seconds: float) -> None:
        """Wait, under `changed`. Raises `CopyStopped`, or retires `bounce` and raises `ReadFailed` when it takes too
        long."""
        over = self._changed.wait_for(lambda: copy.stop_requested or until(), seconds)
        if copy.stop_requested:
            raise CopyStopped("stopped")
        if not over:
            error = f"no answer from the library within {seconds} s"
            bounce.retire(error)
            raise ReadFailed(error)

    def close(self) -> None:
        """No copy has a lease any more. Raises `TimeoutError` when the process cannot be ended."""
        with self._changed:
            self._present.retire("the transport was closed")
        self._close_unused(self._present)

    # ---- inner workings -----------------------------------------------------------------------------------

    @property
    def _is_over(self) -> bool:
        return self._present.state in (BounceState.RETIRED, BounceState.CLOSED)

    def _replace_if_over(self) -> None:
        if self._is_over:
            self._present = self._begin()
            self._present.watch()

    def _begin(self) -> Bounce:
        return Bounce(
            self._loop,
            ib_device=self._ib_device,
            num_slots=self._num_slots,
            block_bytes=self._block_bytes,
            changed=self._changed,
            on_message=self._close_unused,
        )

    def _close_unused(self, bounce: Bounce) -> None:
        with self._changed:
            unused = bounce.take_unused()
        if unused:
            bounce.close(timeout_s=self._timings.close_s)
