"""The process that plays the peer in `benchmarks/transfer.py`: a served pool, its folder, and a plain stream of it.

`benchmarks.peer_process.peer` starts it as `python -m benchmarks.transfer_peer PAGE_BYTES PAGES FOLDER`.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

from benchmarks.pages import ADDRESS, BOOT
from benchmarks.peer_process import PeerReady, filled_pool, read_secret, say_ready, serve_pool, wait_for_end
from transfer.checksum import page_checksums
from transfer.disk.spool import Spool

STREAM_PIECE_BYTES = 128 << 10
"""Of the plain stream, sent and received at a time."""


class TransferPeerReady(PeerReady):
    stream_port: int
    spool_seconds: float
    """For all pages to be in the folder, from their being offered."""


def serve(page_bytes: int, num_pages: int, folder: Path) -> None:
    """Serve a pool of random bytes, also by way of `folder`, and plain streams of it, until standard input ends."""
    secret = read_secret()
    memory = filled_pool(page_bytes * num_pages)
    checksums = page_checksums(memory.view, page_bytes, range(num_pages))
    spool = Spool(folder=folder, view=memory.view, page_bytes=page_bytes, replica_id=ADDRESS.replica_id, boot=BOOT)
    begin = time.perf_counter()
    spool.offer(range(num_pages), checksums)
    if not spool.wait_idle(60):
        raise RuntimeError(f"{folder} is too slow: pages were still being written after 60 s")
    spool_seconds = time.perf_counter() - begin
    server = serve_pool(memory, page_bytes=page_bytes, num_pages=num_pages, secret=secret, doors=[spool])
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=stream, args=(listener, memory.view), daemon=True).start()
    ready = TransferPeerReady(
        ticket=server.ticket(),
        stream_port=listener.getsockname()[1],
        checksums=checksums,
        spool_seconds=spool_seconds,
    )
    say_ready(ready)
    wait_for_end()
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


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
