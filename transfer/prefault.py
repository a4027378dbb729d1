"""Takes a pool's memory from the system behind the back of whoever uses it already.

A fresh page is zeroed at its first touch, which costs ten times a copy; a whole pool of them costs seconds. Done ahead,
in a thread that takes only time nobody else wants, they delay neither the start nor a transfer. Not at once, because on
a virtual machine fresh pages come from its host, which is slow, and whatever else starts there needs some, too.
"""

from __future__ import annotations

import os
import threading

from transfer.memory import SharedMemory

_PIECE_BYTES = 256 << 10
"""Small, because whoever maps memory meanwhile waits for the end of a piece."""
_NICENESS = 19


class Prefault:
    """Lifecycle: `start`, then `stop` before the memory is closed. `error` is what the system refused, if it did."""

    def __init__(self, memory: SharedMemory, *, delay_s: float = 0.0) -> None:
        """It begins `delay_s` after its start."""
        self._memory = memory
        self._delay_s = delay_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefault", daemon=True)
        self.error: MemoryError | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, timeout_s: float) -> None:
        """Return once the thread no longer touches the memory. Raises `TimeoutError` when the system does not come back
        in time; the memory must then be kept."""
        self._stopping.set()
        if self._thread.ident is not None and not self.wait(timeout_s):
            raise TimeoutError(
                f"the system has not given the next {_PIECE_BYTES >> 10} KiB of a KV pool within {timeout_s:g} s"
            )

    def wait(self, timeout_s: float) -> bool:
        """Whether the thread ended in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # on Linux: of this thread alone
        self._stopping.wait(self._delay_s)
        nbytes = self._memory.nbytes
        for start in range(0, nbytes, _PIECE_BYTES):
            if self._stopping.is_set():
                return
            try:
                self._memory.populate(start, min(_PIECE_BYTES, nbytes - start))
            except MemoryError as error:
                self.error = error
                return
