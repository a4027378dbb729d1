"""One life of the library at the fetching end: a process, and the memory that it reads peers' pages into.

Lifecycle: STARTING until the process is ready -> READY: reads run -> RETIRED when a read failed, the process died or
its work is over: no copy takes it any more, those that have it may end -> CLOSED: the process was killed, and its
memory went with it. A slot is in use from `begin` until the process has answered *and* `release` was called; one whose
read failed is never used again. `lives.py` decides; here is the mechanism.
"""

from __future__ import annotations

import enum
import itertools
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transfer.io_loop import READ, IoLoop
from transfer.memory import SharedMemory
from transfer.mooncake.messages import IDENTITY_BYTES, Done, DoorAddress, Open, Read, Ready, Refused
from transfer.mooncake.process import EngineProcess
from transfer.spans import Span

logger = logging.getLogger(__name__)

START_S = 60.0


class BounceState(enum.Enum):
    STARTING = enum.auto()
    READY = enum.auto()
    RETIRED = enum.auto()
    CLOSED = enum.auto()


_LEGAL = {
    BounceState.STARTING: {BounceState.READY, BounceState.RETIRED},
    BounceState.READY: {BounceState.RETIRED},
    BounceState.RETIRED: {BounceState.CLOSED},
    BounceState.CLOSED: set[BounceState](),
}


@dataclass(kw_only=True, eq=False)
class Block:
    """A read of some pages of one copy into one slot."""

    number: int
    slot: int
    spans: Sequence[Span]
    nbytes: int
    done: bool = False
    released: bool = False
    error: str | None = None
    begun: bool = True
    """False when it failed before anything could be written."""
    identified: bool = False
    """The door's identity follows the pages."""


class Bounce:
    """Everything but `close` is called under `changed`, which is notified when a block is done or the state changes.
    `on_message` is called in the loop's thread after that, without the lock."""

    def __init__(
        self,
        loop: IoLoop,
        *,
        ib_device: str,
        num_slots: int,
        block_bytes: int,
        changed: threading.Condition,
        on_message: Callable[[Bounce], None],
    ) -> None:
        self._loop = loop
        self._changed = changed
        self._on_message = on_message
        self._slot_bytes = -(-(block_bytes + IDENTITY_BYTES) // 4096) * 4096
        self.state = BounceState.STARTING
        self.error = ""
        self.dead = False
        """The process has ended; so has every block."""
        self.leases = 0
        """Copies that are using it; it is closed when it is retired and has none."""
        self._free = list(range(num_slots))
        self._blocks: dict[int, Block] = {}
        self._numbers = itertools.count()
        self._memory = SharedMemory(num_slots * self._slot_bytes, prefault=False, shared_writable=True)
        try:
            self._process = EngineProcess(
                memory_fd=self._memory.fd,
                memory_bytes=self._memory.nbytes,
                host=socket.gethostname() if ib_device else "127.0.0.1",
                ib_device=ib_device,
                serves=False,
            )
        except OSError:
            self._memory.close()
            raise
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._memory.view, dtype=np.uint8)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """Raises `MooncakeUnavailable` when the process cannot do its work. To be called before `watch`, if at all."""
        self._process.wait_ready(timeout_s=START_S)
        self._move_to(BounceState.READY)

    def watch(self) -> None:
        """From now on the loop takes the process's messages."""
        self._loop.call_soon(lambda: self._loop.watch(self._process.sock, READ, self._receive))

    def open(self, address: DoorAddress) -> None:
        """Have the process shake hands with a peer."""
        self._send(Open(session=address.session))

    @property
    def has_slot(self) -> bool:
        return bool(self._free)

    def begin(self, address: DoorAddress, pages: Sequence[Span], page_bytes: int, *, identified: bool) -> Block:
        """Read `pages`, and after them the door's identity if that is wanted, into a free slot."""
        block = Block(number=next(self._numbers), slot=self._free.pop(), spans=pages, nbytes=0, identified=identified)
        offset = block.slot * self._slot_bytes
        spans = []
        for source, _, length in pages:
            spans.append((address.base + source * page_bytes, offset + block.nbytes, length * page_bytes))
            block.nbytes += length * page_bytes
        if identified:
            spans.append((address.identity_at, offset + block.nbytes, IDENTITY_BYTES))
        self._blocks[block.number] = block
        self._send(Read(number=block.number, session=address.session, spans=spans))
        return block

    def landed(self, block: Block) -> npt.NDArray[np.uint8]:
        """What was read, uint8 [nbytes + IDENTITY_BYTES]; ours until `release`. The last bytes are anything where no
        identity was asked for."""
        start = block.slot * self._slot_bytes
        return self._bytes[start : start + block.nbytes + IDENTITY_BYTES]

    def release(self, block: Block) -> None:
        """Nobody looks at it any more; its slot is free again once it is done."""
        block.released = True
        if block.done and block.error is None:
            self._free.append(block.slot)

    def retire(self, error: str) -> None:
        """Let no further copy take it."""
        if self.state in (BounceState.STARTING, BounceState.READY):
            self._move_to(BounceState.RETIRED)
            self.error = error
            self._changed.notify_all()

    def take_unused(self) -> bool:
        """Whether the caller is the one to call `close`, now."""
        if self.state is not BounceState.RETIRED or self.leases:
            return False
        self._move_to(BounceState.CLOSED)
        return True

    def close(self, *, timeout_s: float) -> None:
        """Kill the process and give its memory back; log how it ended if it was dead. Raises `TimeoutError` when the
        kernel cannot end it in time."""
        was_dead = self.dead
        self._process.kill(timeout_s=timeout_s)
        if was_dead:
            logger.warning("the mooncake process %d ended (%s)", self.pid, self._process.ending())
        self._loop.call_soon(self._forget)
        del self._bytes
        self._memory.close()

    # ---- inner workings -----------------------------------------------------------------------------------

    def _move_to(self, state: BounceState) -> None:
        assert state in _LEGAL[self.state], f"a bounce cannot go from {self.state} to {state}"
        self.state = state

    def _send(self, request: Open | Read) -> None:
        try:
            self._process.send(request)
        except OSError as error:
            self._died(f"the mooncake process does not listen: {error}")

    def _forget(self) -> None:
        self._loop.forget(self._process.sock)
        self._process.sock.close()

    def _receive(self) -> None:
        """In the loop's thread."""
        with self._changed:
            try:
                while (answer := self._process.receive()) is not None:
                    if isinstance(answer, Done):
                        self._done(answer)
                    elif isinstance(answer, Ready) and self.state is BounceState.STARTING:
                        self._move_to(BounceState.READY)
                    elif isinstance(answer, Refused):
                        self.retire(answer.error)
            except EOFError:
                self._loop.forget(self._process.sock)
                self._died("the mooncake process ended")  # how, `close` finds out: not to be waited for under the lock
            self._changed.notify_all()
        self._on_message(self)

    def _done(self, answer: Done) -> None:
        block = self._blocks.pop(answer.number, None)
        if block is None:
            return  # given up with the whole process
        block.done, block.error, block.begun = True, answer.error, answer.begun
        if answer.error is not None and answer.begun:
            self.retire(answer.error)
        elif block.released or not answer.begun:
            self._free.append(block.slot)

    def _died(self, error: str) -> None:
        self.retire(error)
        self.dead = True
        for block in self._blocks.values():
            block.done, block.error = True, error
        self._blocks.clear()
