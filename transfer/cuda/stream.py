"""One CUDA stream that brings blocks of pages into our pool, and back to the host where they are to be verified.

Owned by the transport and used by its copying thread alone. A few blocks are under way at a time, each in a slot: the
event that says when it has landed, and pinned memory to read it back to. Work that was given to a GPU cannot be taken
back, so every block that was begun has to be waited for, whatever became of its copy.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transfer.cuda.memory import DeviceMemory
from transfer.spans import Span

logger = logging.getLogger(__name__)

_VERIFIED_BLOCK_BYTES = 4 << 20
_PLAIN_BLOCK_BYTES = 64 << 20
_NUM_SLOTS = 2
"""So that the GPU fills one while the other is verified."""
_QUICK_LOOKS = 100  # at an event, a microsecond or two each; then others may have the processor
_LOOK_S = 20e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class _Slot:
    event: int
    staging: int
    seen: memoryview
    """The bytes at `staging`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """Pages under way."""

    num_pages: int
    slot: _Slot


class PageStream:
    """Copies into the pages of `memory`. After `late_s` in one block the stream is `hung`, until that block comes."""

    def __init__(self, memory: DeviceMemory, *, page_bytes: int, clock: Callable[[], float], late_s: float) -> None:
        self.hung = ""
        """What is wrong, if something is; nothing should be given to the stream then."""
        self._memory = memory
        self._cuda = memory.cuda
        self._page_bytes = page_bytes
        self._clock = clock
        self._late_s = late_s
        self._stream = self._cuda.new_stream()
        self._verified_pages = max(1, _VERIFIED_BLOCK_BYTES // page_bytes)
        self._free = deque(self._new_slot(self._verified_pages * page_bytes) for _ in range(_NUM_SLOTS))

    @property
    def has_room(self) -> bool:
        """Whether `begin` may be called."""
        return bool(self._free)

    def block_pages(self, *, verified: bool) -> int:
        """The most pages of one block."""
        return self._verified_pages if verified else max(1, _PLAIN_BLOCK_BYTES // self._page_bytes)

    def begin(self, source: int, pages: Sequence[Span], under_way: deque[Block], *, verified: bool) -> None:
        """Give `pages` of the memory at `source` to the GPU, as the last block of `under_way`.

        Raises `CudaError`; the block is under way all the same, with whatever of it the GPU was given. Only a GPU whose
        context is broken takes no event, and that one writes nothing any more.
        """
        cuda, size, ours, slot = self._cuda, self._page_bytes, self._memory.address, self._free.popleft()
        under_way.append(Block(num_pages=sum(span.length for span in pages), slot=slot))
        seen = slot.staging
        try:
            for first, to, length in pages:
                cuda.copy(ours + to * size, source + first * size, length * size, self._stream)
                if verified:
                    cuda.copy(seen, ours + to * size, length * size, self._stream)
                    seen += length * size
        finally:
            cuda.record(slot.event, self._stream)

    def landed(self, under_way: deque[Block]) -> Block:
        """The oldest block, when it has landed, however long that takes: its pages are not free before. What was read
        back of it is in `seen` until the next `begin`."""
        block, late, looks = under_way.popleft(), self._clock() + self._late_s, 0
        self._free.append(block.slot)
        while not self._cuda.is_done(block.slot.event):
            looks += 1
            if not self.hung and self._clock() > late:
                self.hung = f"the GPU has not ended a copy within {self._late_s} s"
                logger.error("%s; its pages stay out of use until it does", self.hung)
            if looks > _QUICK_LOOKS:
                time.sleep(_LOOK_S)
        self.hung = ""
        return block

    def seen(self, block: Block) -> memoryview:
        """What was read back of a verified block that has landed."""
        return block.slot.seen[: block.num_pages * self._page_bytes]

    def close(self) -> None:
        """With nothing under way."""
        for slot in self._free:
            self._cuda.end_event(slot.event)
            self._cuda.free_pinned(slot.staging)
        self._free.clear()
        self._cuda.end_stream(self._stream)

    def _new_slot(self, staging_bytes: int) -> _Slot:
        staging = self._cuda.allocate_pinned(staging_bytes)
        seen = memoryview((ctypes.c_ubyte * staging_bytes).from_address(staging)).cast("B")
        return _Slot(event=self._cuda.new_event(), staging=staging, seen=seen)
