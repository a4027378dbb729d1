"""The memory behind a KV pool on a GPU, and a peer's, mapped."""

from __future__ import annotations

import ctypes
from typing import Any

from transfer.cuda.library import Cuda


class DeviceMemory:
    """`nbytes` of zeroed memory on a GPU that peers on this host can map by `handle`.

    `torch.as_tensor(memory, device="cuda")` is a view of it. Owned by the replica, from before its first page until
    after its last. Once the handle was given away there is no telling who reads: `close` then leaves the memory to the
    end of the process, after which the driver keeps it until the last mapping has gone.
    """

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        if nbytes <= 0:
            raise ValueError(f"device memory of {nbytes} bytes: the size must be positive")
        self.cuda = cuda
        self.nbytes = nbytes
        self.address = cuda.allocate(nbytes)
        self._exported = False
        self._closed = False

    def handle(self) -> bytes:
        """By which other processes map it."""
        self._exported = True
        return self.cuda.export(self.address)

    def read(self, start: int, nbytes: int) -> bytearray:
        """A copy of these bytes. What other streams than the default one have written must have been waited for."""
        self._check(start, nbytes)
        data = bytearray(nbytes)
        self.cuda.copy_now(_address_of(data), self.address + start, nbytes)
        return data

    def write(self, start: int, data: bytearray) -> None:
        """Put `data` at `start`."""
        self._check(start, len(data))
        self.cuda.copy_now(self.address + start, _address_of(data), len(data))

    def close(self) -> None:
        """Give it back, unless somebody may have mapped it."""
        if not (self._closed or self._exported):
            self.cuda.free(self.address)
        self._closed = True

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def _check(self, start: int, nbytes: int) -> None:
        if not 0 < nbytes <= self.nbytes - start <= self.nbytes:
            raise ValueError(f"bytes {start} to {start + nbytes} of a device memory of {self.nbytes} bytes")


def _address_of(data: bytearray) -> int:
    return ctypes.addressof((ctypes.c_ubyte * len(data)).from_buffer(data))
