"""The memory behind a KV pool, and a peer's view of it.

A pool's owner creates `SharedMemory`: an anonymous memory file (memfd), mapped once. It is sealed against being
resized, so that a reader can never be killed by SIGBUS behind the file's end, and, unless it was meant to be shared for
writing, against any further writable mapping, so that only its owner can change it. Peers are handed a descriptor that
is for reading in any case. The kernel frees it with its last mapping: nothing is left behind by `kill -9`, and no name
is ever entered anywhere.

A reader that was handed the file descriptor (`server.py`) makes a `PeerMemory` of it: read-only, and only after the
seals and the size were found to be what the owner promised.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
from pathlib import Path
from types import TracebackType

_SEAL_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE, Linux 5.1; fcntl has no name for it before Python 3.13
_MADV_POPULATE_WRITE = 23  # Linux 5.14; mmap has no name for it
_NO_RESIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

_libc = ctypes.CDLL(None, use_errno=True)


class SharedMemory:
    """`nbytes` of zeroed, page-aligned memory that peers on this host can be given to read.

    `prefault` takes the memory from the system at once; `Prefault` (prefault.py) does so later. Huge pages are used
    where the system lends them. `shared_writable` lets another process that is handed `fd` write too; what is mapped by
    `reading_fd` can never be written. Raises `ValueError` for a size that is not positive and `MemoryError` when the
    system has too little available: better here than by the kernel's killing somebody in the middle of a request.
    """

    def __init__(self, nbytes: int, *, prefault: bool = True, shared_writable: bool = False) -> None:
        if nbytes <= 0:
            raise ValueError(f"shared memory of {nbytes} bytes: the size must be positive")
        self.nbytes = nbytes
        self.shared_writable = shared_writable
        available = _available_bytes()
        if nbytes > available:
            raise _too_little(nbytes, f"{available / 2**20:,.0f} MiB are available")
        self.fd = os.memfd_create("pd-serve-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, nbytes)
            self._mapping = mmap.mmap(self.fd, nbytes)
            with contextlib.suppress(OSError):  # a wish: without it the pages are small
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
            seals = _NO_RESIZE | fcntl.F_SEAL_SEAL | (0 if shared_writable else _SEAL_FUTURE_WRITE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            self.reading_fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            os.close(self.fd)
            raise _too_little(nbytes, str(error)) from error
        self.view = memoryview(self._mapping)
        """All of it, writable. Whatever is made from it (arrays, tensors) keeps the memory alive."""
        self._closed = False
        if prefault:
            try:
                self.populate(0, nbytes)
            except MemoryError:
                self.close()
                raise

    def populate(self, start: int, nbytes: int) -> None:
        """Take this part from the system, its contents unchanged; other threads run meanwhile.

        `start` is a multiple of the system's page size. Raises `MemoryError` when the system has too little.
        """
        anchor = ctypes.c_char.from_buffer(self._mapping, start)  # not mmap.madvise, which holds the GIL
        try:
            if _libc.madvise(ctypes.byref(anchor), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE) == 0:
                return
            if (number := ctypes.get_errno()) != errno.EINVAL:
                raise _too_little(nbytes, os.strerror(number))
            os.posix_fallocate(self.fd, start, nbytes)  # an older kernel can at least set the pages aside
        except OSError as error:
            raise _too_little(nbytes, str(error)) from error
        finally:
            del anchor

    def close(self) -> None:
        """Give the memory back: at once when nothing else refers to it, else when the last array made from it goes."""
        if self._closed:
            return
        self._closed = True
        os.close(self.fd)
        os.close(self.reading_fd)
        with contextlib.suppress(BufferError):
            self.view.release()
            self._mapping.close()

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PeerMemory:
    """Another process's `SharedMemory`, mapped read-only, or for writing where that was meant for it. Takes `fd` over
    and closes it in any case.

    Raises `ValueError` when the file is shorter than `nbytes`, could still be resized by its owner, or must not be
    written.
    """

    def __init__(self, fd: int, *, nbytes: int, writable: bool = False) -> None:
        try:
            size = os.fstat(fd).st_size
            if size < nbytes:
                raise ValueError(f"the peer's memory has {size} bytes where its ticket promises {nbytes}")
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if seals & _NO_RESIZE != _NO_RESIZE:
                raise ValueError(f"the peer's memory is not sealed against resizing (seals {seals:#x})")
            self._mapping = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        except OSError as error:
            raise ValueError(f"the peer's memory cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        with contextlib.suppress(OSError):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(self._mapping)

    def close(self) -> None:
        """Unmap it: at once when nothing else refers to it, else when the last array made from it goes (one that a log
        record of an error holds, say)."""
        with contextlib.suppress(BufferError):
            self.view.release()
            self._mapping.close()


def _available_bytes() -> int:
    """What the system could give without swapping; a great deal where it does not tell."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return 1 << 62


def _too_little(nbytes: int, why: str) -> MemoryError:
    return MemoryError(
        f"cannot take {nbytes / 2**20:,.0f} MiB of shared memory ({why}); lower max_total_tokens or free memory"
    )


def host_id() -> str:
    """Equal in two processes that can pass each other file descriptors: same boot of the same kernel, same network
    namespace (abstract Unix sockets belong to one)."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.stat("/proc/self/ns/net").st_ino
    return hashlib.sha256(f"{boot}/{namespace}".encode()).hexdigest()[:16]
