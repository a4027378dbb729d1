"""The program of a mooncake process; `process.py` starts it. It has the library, one memory and a socket to its parent.

It ends with its parent: when the socket does. It leaves without the library's own clean-up, which may wait for peers.
One loop serves the socket and looks after the reads under way, which the library does in threads of its own; only a
handshake with a peer, which blocks, has a thread here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass

import msgspec
import numpy as np

from transfer.mooncake.library import MooncakeUnavailable, new_engine
from transfer.mooncake.messages import (
    IDENTITY_BYTES,
    MAX_MESSAGE_BYTES,
    Answer,
    Done,
    Read,
    Ready,
    Refused,
    Request,
    Settings,
)

_LOOK_S = 20e-6
_LONGEST_LOOK_S = 200e-6
"""Between two looks at reads under way: the library has no other way to tell, and its own waiting burns a core. The
longer nothing has ended, the less often: an eighth of that time is all that a look can be late by."""
_PR_SET_TIMERSLACK = 29
_COMPLETED, _FAILED = 1, -1
_NO_BATCH = (0, 2**64 - 1)


@dataclass(eq=False)
class _Running:
    """A read whose requests the library has."""

    number: int
    batches: deque[int]
    error: str | None = None


class Child:
    def __init__(self, settings: Settings, sock: socket.socket) -> None:
        self._sock = sock
        self._rdma = bool(settings.ib_device)
        self._serves = settings.serves
        self._mappings: list[mmap.mmap] = []  # which end with this process
        self._decoder = msgspec.json.Decoder(Request)
        self._opened: dict[str, bool] = {}
        self._waiting: dict[str, list[Read]] = {}  # for the handshake with a session
        self._handshakes: queue.SimpleQueue[tuple[str, bool]] = queue.SimpleQueue()
        self._running: list[_Running] = []
        self._engine = new_engine(host=settings.host, ib_device=settings.ib_device)
        self._base = self._map(settings.memory_fd, settings.memory_bytes)
        identity_at = self._map_identity(bytes.fromhex(settings.identity)) if settings.serves else 0
        session = f"{settings.host}:{self._engine.get_rpc_port()}"
        self._answer(Ready(session=session, base=self._base, identity_at=identity_at))

    def run(self) -> None:
        news_at = 0.0
        while True:
            busy, now = bool(self._running or self._waiting), time.monotonic()
            look_s = min(max((now - news_at) / 8, _LOOK_S), _LONGEST_LOOK_S)
            if select.select([self._sock], [], [], look_s if busy else None)[0]:
                news_at = time.monotonic()
                data = self._sock.recv(MAX_MESSAGE_BYTES)
                if not data:
                    return
                self._take(self._decoder.decode(data))
            while not self._handshakes.empty():
                self._shaken(*self._handshakes.get())
            still_running = [running for running in self._running if not self._has_ended(running)]
            if len(still_running) < len(self._running):
                self._running, news_at = still_running, time.monotonic()

    # ---- memory -------------------------------------------------------------------------------------------

    def _map(self, fd: int, nbytes: int) -> int:
        """Map it, register it where peers or RDMA need that, and return its address."""
        writable = self._rdma or not self._serves
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        mapping = mmap.mmap(fd, nbytes, prot=prot)
        self._mappings.append(mapping)
        address: int = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        if (self._serves or self._rdma) and self._engine.register_memory(address, nbytes) != 0:
            raise MooncakeUnavailable(f"mooncake-transfer-engine cannot register {nbytes} bytes of memory")
        return address

    def _map_identity(self, identity: bytes) -> int:
        assert len(identity) == IDENTITY_BYTES, "the identity has another length"
        fd = os.memfd_create("pd-serve-identity", os.MFD_CLOEXEC)
        os.write(fd, identity.ljust(mmap.PAGESIZE, b"\0"))
        return self._map(fd, mmap.PAGESIZE)

    # ---- reads --------------------------------------------------------------------------------------------

    def _take(self, request: Request) -> None:
        session = request.session
        if self._opened.get(session):
            if isinstance(request, Read):
                self._begin(request)
            return
        if session not in self._waiting:
            self._waiting[session] = []
            threading.Thread(target=self._shake_hands, args=(session,), daemon=True).start()
        if isinstance(request, Read):
            self._waiting[session].append(request)

    def _shake_hands(self, session: str) -> None:
        """Once done, the library knows the peer and submitting a read no longer waits for it."""
        self._handshakes.put((session, self._engine.get_first_buffer_address(session) != 0))

    def _shaken(self, session: str, known: bool) -> None:
        self._opened[session] = known
        for request in self._waiting.pop(session):
            if known:
                self._begin(request)
            else:
                self._answer(Done(number=request.number, error=f"no handshake with {session}", begun=False))

    def _begin(self, request: Read) -> None:
        running = _Running(number=request.number, batches=deque())
        for address, offset, nbytes in request.spans:
            batch = self._engine.batch_transfer_async_read(request.session, [self._base + offset], [address], [nbytes])
            if batch in _NO_BATCH:
                running.error = f"the library refused a read of {nbytes} bytes"
                break
            running.batches.append(batch)
        self._running.append(running)

    def _has_ended(self, running: _Running) -> bool:
        """Whether none of its requests is under way, as far as the library tells; then it has been answered."""
        while running.batches:
            status = self._engine.transfer_check_status(running.batches[0])
            if status not in (_COMPLETED, _FAILED):
                return False
            running.batches.popleft()
            if status == _FAILED:
                running.error = "the library reported a failed read"
        self._answer(Done(number=running.number, error=running.error, begun=True))
        return True

    def _answer(self, answer: Answer) -> None:
        self._sock.sendall(msgspec.json.encode(answer))


def hush() -> None:
    """The library tells standard error of all it does; to be heard, it must be asked for with its own MC_LOG_LEVEL."""
    if "MC_LOG_LEVEL" not in os.environ:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)
        os.close(silence)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # strangers can make it abort, but not fill disks by that
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # or the kernel adds 50 us to each wait for the next look
    hush()
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    sock = socket.socket(fileno=settings.socket_fd)
    try:
        Child(settings, sock).run()
    except MooncakeUnavailable as error:
        sock.sendall(msgspec.json.encode(Refused(error=str(error))))
    except ConnectionError:
        pass  # the parent has gone
    except Exception:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
