"""The process that plays the peer in `benchmarks/transfer.py`: a served pool, its folder, and a plain stream of it.

`peer` starts it as `python -m benchmarks.transfer_peer PAGE_BYTES PAGES FOLDER`; the secret comes by standard input.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.pages import ADDRESS, BOOT, LAYOUT, SECRET
from protocol.handshake import RegionTicket
from transfer.checksum import page_checksums
from transfer.disk.spool import Spool
from transfer.memory import SharedMemory
from transfer.server import PageServer

STREAM_PIECE_BYTES = 128 << 10
"""Of the plain stream, sent and received at a time."""


class PeerReady(msgspec.Struct):
    """What the peer process says when it is up."""

    ticket: RegionTicket
    stream_port: int
    checksums: list[int]
    spool_seconds: float
    """For all pages to be in the folder, from their being offered."""


def serve(page_bytes: int, num_pages: int, folder: Path) -> None:
    """Serve a pool of random bytes, also by way of `folder`, and plain streams of it, until standard input ends. The
    secret comes first."""
    secret = sys.stdin.buffer.read(len(SECRET))
    memory = SharedMemory(page_bytes * num_pages)
    np.frombuffer(memory.view, dtype=np.uint8)[:] = np.random.default_rng(0).integers(
        0, 256, memory.nbytes, dtype=np.uint8
    )
    checksums = page_checksums(memory.view, page_bytes, range(num_pages))
    spool = Spool(folder=folder, view=memory.view, page_bytes=page_bytes, replica_id=ADDRESS.replica_id, boot=BOOT)
    begin = time.perf_counter()
    spool.offer(range(num_pages), checksums)
    if not spool.wait_idle(60):
        raise RuntimeError(f"{folder} is too slow: pages were still being written after 60 s")
    spool_seconds = time.perf_counter() - begin
    server = PageServer(
        memory=memory,
        page_bytes=page_bytes,
        num_pages=num_pages,
        layout=LAYOUT,
        host="127.0.0.1",
        boot=BOOT,
        secret=secret,
        doors=[spool],
    )
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=stream, args=(listener, memory.view), daemon=True).start()
    ready = PeerReady(
        ticket=server.ticket(),
        stream_port=listener.getsockname()[1],
        checksums=checksums,
        spool_seconds=spool_seconds,
    )
    sys.stdout.buffer.write(msgspec.json.encode(ready) + b"\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.close()
    spool.close(timeout_s=10)


def stream(listener: socket.socket, view: memoryview) -> None:
    """Answer each first byte and length, of eight bytes each, with as many bytes: the plain stream to compare with."""
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while wanted := sock.recv(16, socket.MSG_WAITALL):
        first, length = int.from_bytes(wanted[:8], "big"), int.from_bytes(wanted[8:], "big")
        for start in range(first, first + length, STREAM_PIECE_BYTES):
            sock.sendall(view[start : min(start + STREAM_PIECE_BYTES, first + length)])


@contextmanager
def peer(page_bytes: int, num_pages: int, folder: Path) -> Iterator[PeerReady]:
    """A peer in its own process, for as long as the context lasts."""
    command = [sys.executable, "-m", "benchmarks.transfer_peer", str(page_bytes), str(num_pages), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.write(SECRET)
        process.stdin.flush()
        yield msgspec.json.decode(process.stdout.readline(), type=PeerReady)
        process.stdin.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
