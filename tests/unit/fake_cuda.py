"""CUDA without a GPU: an object that keeps CUDA's promises and no others, over memory of the host.

Nothing is copied before somebody asks whether an event has come, and nothing at all while the GPU hangs; memory that is
not allocated, or not mapped any more, cannot be touched; each process has to map another's memory before it reads it.
"""

from __future__ import annotations

import ctypes
import itertools
import threading

from transfer_pools import LAYOUT, pattern

from protocol.rooms import PeerAddress
from transfer.checksum import page_checksums
from transfer.cuda.door import CudaDoor, device_ticket
from transfer.cuda.library import HANDLE_BYTES, CudaError
from transfer.cuda.memory import DeviceMemory


class Machine:
    """The GPUs of one host, and what its processes have shared."""

    def __init__(self) -> None:
        self.memories: dict[int, ctypes.Array] = {}
        self.handles: dict[bytes, int] = {}
        self.numbers = itertools.count(1)
        self.going = threading.Event()
        """Cleared while the GPUs hang."""
        self.going.set()


class FakeCuda:
    """`transfer.cuda.library.Cuda` for one process."""

    def __init__(self, machine: Machine, *, gpu: str = "GPU-0", visible: tuple[str, ...] = ("GPU-0",)) -> None:
        self.machine = machine
        self.gpu = gpu
        self.visible = visible
        self.mapped: list[int] = []
        self.broken = ""
        """The error that every call raises from now on."""
        self.failing_copies = 0
        """So many copies fail, and the GPU lives on."""
        self._own: set[int] = set()
        self._streams: dict[int, list[tuple[int, int, int]]] = {}
        self._events: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    @property
    def held(self) -> tuple[int, int, int]:
        """Memories, streams and events not given back."""
        return len(self._own), len(self._streams), len(self._events)

    def visible_gpus(self) -> list[str]:
        return list(self.visible)

    def allocate(self, nbytes: int) -> int:
        self._check()
        memory = (ctypes.c_ubyte * nbytes)()
        address = ctypes.addressof(memory)
        self.machine.memories[address] = memory
        self._own.add(address)
        return address

    allocate_pinned = allocate

    def free(self, address: int) -> None:
        self._own.remove(address)
        del self.machine.memories[address]

    free_pinned = free

    def export(self, address: int) -> bytes:
        handle = next(self.machine.numbers).to_bytes(HANDLE_BYTES, "big")
        self.machine.handles[handle] = address
        return handle

    def open(self, handle: bytes) -> int:
        self._check()
        if handle not in self.machine.handles:
            raise CudaError("cuIpcOpenMemHandle_v2: invalid argument (1)")
        self.mapped.append(self.machine.handles[handle])
        return self.mapped[-1]

    def close(self, address: int) -> None:
        with self._lock:
            self.mapped.remove(address)

    def new_stream(self) -> int:
        stream = next(self.machine.numbers)
        self._streams[stream] = []
        return stream

    def end_stream(self, stream: int) -> None:
        assert not self._streams.pop(stream), "a stream ends with work to do"

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._check()
        if self.failing_copies:
            self.failing_copies -= 1
            raise CudaError("cuMemcpyAsync: out of memory (2)")
        self._streams[stream].append((target, source, nbytes))

    def copy_now(self, target: int, source: int, nbytes: int) -> None:
        self._check()
        assert self._may_touch(source, nbytes) or self._may_touch(target, nbytes)
        ctypes.memmove(target, source, nbytes)

    def new_event(self) -> int:
        event = next(self.machine.numbers)
        self._events[event] = (0, 0)
        return event

    def end_event(self, event: int) -> None:
        del self._events[event]

    def record(self, event: int, stream: int) -> None:
        self._check()
        self._events[event] = stream, len(self._streams[stream])

    def is_done(self, event: int) -> bool:
        self._check()
        if not self.machine.going.is_set():
            return False
        stream, count = self._events[event]
        for target, source, nbytes in self._streams.get(stream, [])[:count]:
            with self._lock:
                assert self._may_touch(source, nbytes), "memory was read that is not mapped"
                assert self._may_touch(target, nbytes), "memory was written that is not ours"
                ctypes.memmove(target, source, nbytes)
        if count:
            del self._streams[stream][:count]
            self._events = {
                each: (where, max(0, left - count) if where == stream else left)
                for each, (where, left) in self._events.items()
            }
        return True

    def _may_touch(self, start: int, nbytes: int) -> bool:
        return any(
            address <= start and start + nbytes <= address + len(self.machine.memories[address])
            for address in [*self._own, *self.mapped]
        )

    def _check(self) -> None:
        if self.broken:
            raise CudaError(self.broken)


class GpuPool:
    """A peer with a pool in GPU memory, in what passes for another process."""

    def __init__(
        self, machine: Machine, *, boot: int, page_bytes: int = 4096, num_pages: int = 64, gpu: str = "GPU-0"
    ) -> None:
        self.page_bytes = page_bytes
        self.memory = DeviceMemory(FakeCuda(machine, gpu=gpu), page_bytes * num_pages)
        self.content = pattern(boot, page_bytes * num_pages).tobytes()
        self.memory.write(0, bytearray(self.content))
        door = CudaDoor(self.memory)
        self.address = PeerAddress(f"replica-{boot}", boot, "127.0.0.1", 1)
        self.ticket = device_ticket(door, num_pages=num_pages, page_bytes=page_bytes, layout=LAYOUT)

    def page(self, page: int) -> bytes:
        return self.content[page * self.page_bytes : (page + 1) * self.page_bytes]

    def checksums(self, pages: list[int]) -> list[int]:
        return page_checksums(memoryview(self.content), self.page_bytes, pages)

    def is_unchanged(self) -> bool:
        return self.memory.read(0, len(self.content)) == self.content


def view_of(memory: DeviceMemory) -> memoryview:
    """The bytes of fake device memory."""
    return memoryview((ctypes.c_ubyte * memory.nbytes).from_address(memory.address)).cast("B")
