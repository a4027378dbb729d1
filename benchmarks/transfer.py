"""How fast pages move: each transport's bandwidth and latency, against a memcpy and a plain loopback stream.

    python -m benchmarks.transfer [--write]

A process of its own plays the peer. Every round measures all ways one after the other, those compared with among them,
so that a busy machine slows all of them; the table shows medians over the rounds, and shares as medians of the rounds'
own shares. Contiguous pages form one span; scattered ones lie at random on both sides. `disk` takes pages that were
written before, most likely out of the system's page cache; how long writing took stands in a table of its own.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.report import Report, Table, add_report_options, finish
from benchmarks.timed_fetch import timed_fetch
from protocol.handshake import RegionTicket
from protocol.rooms import PeerAddress
from transfer.checksum import page_checksums
from transfer.disk.spool import Spool
from transfer.fetcher import FetchJob, PageFetcher, TransportName
from transfer.memory import SharedMemory
from transfer.server import PageServer

SECRET = os.urandom(16)
LAYOUT = "benchmark"
BOOT = 1
ADDRESS = PeerAddress("peer", BOOT, "127.0.0.1", 1)


class PeerReady(msgspec.Struct):
    """What the peer process says when it is up."""

    ticket: RegionTicket
    stream_port: int
    checksums: list[int]
    spool_seconds: float
    """For all pages to be in the folder, from their being offered."""


# ---- the peer's process ---------------------------------------------------------------------------------------


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
    """Answer each eight-byte length with as many bytes: the plain stream to compare with."""
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while length := sock.recv(8, socket.MSG_WAITALL):
        sock.sendall(view[: int.from_bytes(length, "big")])


# ---- this process ---------------------------------------------------------------------------------------------


class Receiver:
    """Our pool with one fetcher per transport, the private memory of the memcpy, and the plain stream's socket."""

    def __init__(self, ready: PeerReady, folder: Path) -> None:
        ticket = ready.ticket
        self.page_bytes = ticket.page_bytes
        self.checksums = ready.checksums
        self.memory = SharedMemory(ticket.num_pages * ticket.page_bytes)
        self.source = np.ones(self.memory.nbytes, dtype=np.uint8)
        self.target = np.zeros(self.memory.nbytes, dtype=np.uint8)
        self.socket = socket.create_connection(("127.0.0.1", ready.stream_port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transports: tuple[TransportName, ...] = ("shm", "tcp", "disk")
        self.fetchers = {
            str(name): PageFetcher(
                memory=self.memory,
                page_bytes=ticket.page_bytes,
                layout=LAYOUT,
                secret=SECRET,
                num_threads=1,
                transport=name,
                folder=folder,
            )
            for name in transports
        }
        for fetcher in self.fetchers.values():
            fetcher.attach(ADDRESS, ticket)

    def memcpy(self, count: int) -> float:
        """Seconds for `count` pages."""
        nbytes, begin = count * self.page_bytes, time.perf_counter()
        self.target[:nbytes] = self.source[:nbytes]
        return time.perf_counter() - begin

    def plain_stream(self, count: int) -> float:
        """Seconds for `count` pages, from the request to the last byte."""
        nbytes, view = count * self.page_bytes, self.memory.view
        begin, done = time.perf_counter(), 0
        self.socket.sendall(nbytes.to_bytes(8, "big"))
        while done < nbytes:
            done += self.socket.recv_into(view[done:nbytes])
        return time.perf_counter() - begin

    def fetch(self, transport: str, source: Sequence[int], target: Sequence[int], *, verified: bool) -> float:
        """Seconds from the call of `fetch` to that of `on_done`. Raises `RuntimeError` when the fetch fails."""
        checksums = [self.checksums[page] for page in source] if verified else []
        job = FetchJob(key=0, peer=ADDRESS, source_pages=source, target_pages=target, checksums=checksums)
        return timed_fetch(self.fetchers[transport], job, transport=transport)

    def close(self) -> None:
        for fetcher in self.fetchers.values():
            fetcher.close()
        self.socket.close()
        self.memory.close()


@contextmanager
def peer(page_bytes: int, num_pages: int, folder: Path) -> Iterator[PeerReady]:
    """A peer in its own process, for as long as the context lasts."""
    command = [sys.executable, "-m", "benchmarks.transfer", "--serve", str(page_bytes), str(num_pages), str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.write(SECRET)
        process.stdin.flush()
        yield msgspec.json.decode(process.stdout.readline(), type=PeerReady)
        process.stdin.close()


def contiguous(count: int, num_pages: int) -> tuple[list[int], list[int]]:
    """Source and target pages of one span."""
    return list(range(count)), list(range(count))


def scattered(count: int, num_pages: int) -> tuple[list[int], list[int]]:
    """Source and target pages at random: nearly as many spans as pages."""
    random = np.random.default_rng(count)
    return random.permutation(num_pages)[:count].tolist(), random.permutation(num_pages)[:count].tolist()


PageChooser = Callable[[int, int], tuple[list[int], list[int]]]


def ways_to_move(receiver: Receiver, source: list[int], target: list[int]) -> dict[str, Callable[[], float]]:
    """What is measured and what it is compared with: each moves as many bytes, and returns the seconds it took."""
    return {
        "memcpy": lambda: receiver.memcpy(len(source)),
        "shm": lambda: receiver.fetch("shm", source, target, verified=False),
        "shm verified": lambda: receiver.fetch("shm", source, target, verified=True),
        "stream": lambda: receiver.plain_stream(len(source)),
        "tcp": lambda: receiver.fetch("tcp", source, target, verified=False),
        "tcp verified": lambda: receiver.fetch("tcp", source, target, verified=True),
        "disk verified": lambda: receiver.fetch("disk", source, target, verified=True),
    }


def bandwidth(receiver: Receiver, sizes: Sequence[int], choose: PageChooser, *, rounds: int, title: str) -> Table:
    table = Table(
        title=title,
        columns=[
            "bytes",
            "memcpy GB/s",
            "shm GB/s",
            "share of memcpy",
            "shm verified GB/s",
            "stream GB/s",
            "tcp GB/s",
            "share of stream",
            "tcp verified GB/s",
            "disk verified GB/s",
        ],
    )
    num_pages = len(receiver.checksums)
    for nbytes in sizes:
        count = nbytes // receiver.page_bytes
        ways = ways_to_move(receiver, *choose(count, num_pages))
        for way in ways.values():
            way()  # first touches
        seconds = [{name: way() for name, way in ways.items()} for _ in range(rounds)]
        speed = {name: nbytes / statistics.median(row[name] for row in seconds) / 1e9 for name in ways}
        of_memcpy = statistics.median(row["memcpy"] / row["shm"] for row in seconds)
        of_stream = statistics.median(row["stream"] / row["tcp"] for row in seconds)
        table.add(
            human(nbytes),
            speed["memcpy"],
            speed["shm"],
            f"{of_memcpy:.0%}",
            speed["shm verified"],
            speed["stream"],
            speed["tcp"],
            f"{of_stream:.0%}",
            speed["tcp verified"],
            speed["disk verified"],
        )
    return table


def latency(receiver: Receiver, sizes: Sequence[int], *, rounds: int) -> Table:
    columns = ["bytes", "transport", "verified", "p50 us", "p90 us", "p99 us"]
    table = Table(title="latency: from the call of fetch to that of on_done", columns=columns)
    for nbytes in sizes:
        source, target = contiguous(nbytes // receiver.page_bytes, 0)
        for transport in receiver.fetchers:
            for verified in (True,) if transport == "disk" else (False, True):
                times = [receiver.fetch(transport, source, target, verified=verified) for _ in range(rounds)]
                cuts = statistics.quantiles(times, n=100)
                table.add(
                    human(nbytes), transport, "yes" if verified else "no", *(cuts[cut] * 1e6 for cut in (49, 89, 98))
                )
    return table


def spooling(nbytes: int, seconds: float) -> Table:
    table = Table(title="writing pages to the folder, once", columns=["bytes", "disk write GB/s"])
    table.add(human(nbytes), nbytes / seconds / 1e9)
    return table


def human(nbytes: int) -> str:
    return f"{nbytes >> 20} MB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=3, metavar=("PAGE_BYTES", "PAGES", "FOLDER"), help="be the peer (internal)")
    parser.add_argument("--page-kb", type=int, default=16, help="page size in KB (default: %(default)s)")
    parser.add_argument("--max-mb", type=int, default=256, help="largest transfer in MB (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="per bandwidth, the median counts (default: %(default)s)"
    )
    parser.add_argument("--latency-rounds", type=int, default=500, help="per latency (default: %(default)s)")
    parser.add_argument("--folder", help="where `disk` keeps its pages (default: the system's for temporary files)")
    add_report_options(parser)
    options = parser.parse_args()
    if options.serve:
        serve(int(options.serve[0]), int(options.serve[1]), Path(options.serve[2]))
        return
    page_bytes = options.page_kb << 10
    sizes = [size for size in (64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20) if size <= options.max_mb << 20]
    num_pages = max(sizes) // page_bytes
    with tempfile.TemporaryDirectory(dir=options.folder) as name, peer(page_bytes, num_pages, Path(name)) as ready:
        receiver = Receiver(ready, Path(name))
        rounds = options.rounds
        tables = [
            latency(receiver, sizes[:2], rounds=options.latency_rounds),
            bandwidth(receiver, sizes, contiguous, rounds=rounds, title="bandwidth, contiguous pages"),
            bandwidth(
                receiver, sizes, scattered, rounds=rounds, title=f"bandwidth, scattered pages of {options.page_kb} KB"
            ),
        ]
        tables.append(spooling(max(sizes), ready.spool_seconds))
        receiver.close()
    report = Report(
        name="transfer",
        purpose="Pages moved by each transport, against a single-threaded memcpy and a plain loopback TCP stream.",
        configuration={key: value for key, value in vars(options).items() if key not in ("serve", "results", "write")},
        tables=tables,
    )
    finish(report, options)


if __name__ == "__main__":
    main()
