"""The CUDA driver, as far as transfers need it: memory, its IPC handles, copies on a stream, events.

Everything that only a GPU can do is behind `Cuda`. Addresses, streams and events are plain numbers.
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Callable
from typing import Protocol

HANDLE_BYTES = 64

_SUCCESS, _NOT_READY = 0, 600
_LAZY_PEER_ACCESS = 1
_NON_BLOCKING_STREAM = 1
_EVENT_WITHOUT_TIME = 2
_PORTABLE = 1  # pinned memory that every context knows


class CudaError(Exception):
    """A call into CUDA failed."""


class CudaUnavailable(ValueError):
    """There is no CUDA here, or not the GPU that was asked for."""


class Cuda(Protocol):
    """One GPU, from any thread. Every method may raise `CudaError`."""

    @property
    def gpu(self) -> str:
        """The GPU's UUID: the same in every process."""

    def visible_gpus(self) -> list[str]:
        """The UUIDs of all GPUs that this process can see."""

    def allocate(self, nbytes: int) -> int:
        """Zeroed memory on the GPU."""

    def allocate_pinned(self, nbytes: int) -> int:
        """Memory of the host that the GPU copies to at full speed."""

    def free(self, address: int) -> None: ...

    def free_pinned(self, address: int) -> None: ...

    def export(self, address: int) -> bytes:
        """The IPC handle of memory that `allocate` gave."""

    def open(self, handle: bytes) -> int:
        """Map another process's memory."""

    def close(self, address: int) -> None:
        """Unmap it."""

    def new_stream(self) -> int: ...

    def end_stream(self, stream: int) -> None: ...

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Begin a copy, between whatever memories."""

    def copy_now(self, target: int, source: int, nbytes: int) -> None:
        """A whole copy, after all that the default stream has to do."""

    def new_event(self) -> int: ...

    def end_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        """Have `event` come when all that `stream` has to do now is done."""

    def is_done(self, event: int) -> bool: ...


def check_driver(transport: str, otherwise: str) -> None:
    """Raises `CudaUnavailable` where there is no NVIDIA driver for `transport`; `otherwise` is what to set instead."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaUnavailable(
            f"transport {transport!r} needs NVIDIA's driver, which cannot be loaded ({error}); set transport to "
            f"{otherwise}"
        ) from error


class CudaDriver:
    """Implements `Cuda` for GPU `index`, in its primary context, which torch uses too. Raises `CudaUnavailable`."""

    def __init__(self, index: int = 0) -> None:
        check_driver("cuda", "auto")
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._context = ctypes.c_void_p()
        try:
            self._call("cuInit", ctypes.c_uint(0))
            self._num_gpus = self._number("cuDeviceGetCount")
            if not 0 <= index < self._num_gpus:
                raise CudaUnavailable(f"GPU {index} is asked for, but this process can see {self._num_gpus}")
            self._device = self._number("cuDeviceGet", ctypes.c_int(index))
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), ctypes.c_int(self._device))
            self._gpu = self._uuid(self._device)
        except CudaError as error:
            raise CudaUnavailable(f"transport 'cuda' cannot use GPU {index}: {error}") from error

    @property
    def gpu(self) -> str:
        return self._gpu

    def visible_gpus(self) -> list[str]:
        return [self._uuid(self._number("cuDeviceGet", ctypes.c_int(index))) for index in range(self._num_gpus)]

    def allocate(self, nbytes: int) -> int:
        address = self._made("cuMemAlloc_v2", ctypes.c_size_t(nbytes))
        self._here("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(0), ctypes.c_size_t(nbytes))
        self._here("cuCtxSynchronize")
        return address

    def allocate_pinned(self, nbytes: int) -> int:
        return self._made("cuMemHostAlloc", ctypes.c_size_t(nbytes), ctypes.c_uint(_PORTABLE))

    def free(self, address: int) -> None:
        self._here("cuMemFree_v2", ctypes.c_uint64(address))

    def free_pinned(self, address: int) -> None:
        self._here("cuMemFreeHost", ctypes.c_void_p(address))

    def export(self, address: int) -> bytes:
        handle = _Handle()
        self._here("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        given = _Handle.from_buffer_copy(handle)
        return self._made("cuIpcOpenMemHandle_v2", given, ctypes.c_uint(_LAZY_PEER_ACCESS))

    def close(self, address: int) -> None:
        self._here("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def new_stream(self) -> int:
        return self._made("cuStreamCreate", ctypes.c_uint(_NON_BLOCKING_STREAM))

    def end_stream(self, stream: int) -> None:
        self._here("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._here(
            "cuMemcpyAsync",
            ctypes.c_uint64(target),
            ctypes.c_uint64(source),
            ctypes.c_size_t(nbytes),
            ctypes.c_void_p(stream),
        )

    def copy_now(self, target: int, source: int, nbytes: int) -> None:
        self._here("cuMemcpy", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(nbytes))

    def new_event(self) -> int:
        return self._made("cuEventCreate", ctypes.c_uint(_EVENT_WITHOUT_TIME))

    def end_event(self, event: int) -> None:
        self._here("cuEventDestroy_v2", ctypes.c_void_p(event))

    def record(self, event: int, stream: int) -> None:
        self._here("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def is_done(self, event: int) -> bool:
        return self._here("cuEventQuery", ctypes.c_void_p(event), allowed=_NOT_READY) == _SUCCESS

    # ---- inner workings -----------------------------------------------------------------------------------

    def _here(self, name: str, *arguments: object, allowed: int = _SUCCESS) -> int:
        """Call with our context current, which is a matter of the calling thread."""
        self._call("cuCtxSetCurrent", self._context)
        return self._call(name, *arguments, allowed=allowed)

    def _made(self, name: str, *arguments: object) -> int:
        """What a call that makes something gives back by its first argument."""
        result = ctypes.c_uint64()
        self._here(name, ctypes.byref(result), *arguments)
        return result.value

    def _number(self, name: str, *arguments: object) -> int:
        result = ctypes.c_int()
        self._call(name, ctypes.byref(result), *arguments)
        return result.value

    def _uuid(self, device: int) -> str:
        raw = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", ctypes.byref(raw), ctypes.c_int(device))
        return str(uuid.UUID(bytes=bytes(raw)))

    def _call(self, name: str, *arguments: object, allowed: int = _SUCCESS) -> int:
        function: Callable[..., int] = getattr(self._driver, name)
        status = int(function(*arguments))
        if status not in (_SUCCESS, allowed):
            words = ctypes.c_char_p()
            self._driver.cuGetErrorString(ctypes.c_int(status), ctypes.byref(words))
            raise CudaError(f"{name}: {(words.value or b'unknown error').decode()} ({status})")
        return status


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]
