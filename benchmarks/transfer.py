"""How fast pages move: each transport's bandwidth and latency, against a memcpy and a plain loopback stream.

    python -m benchmarks.transfer [--write]

A process of its own plays the peer. Every round measures all ways one after the other, those compared with among them,
so that a busy machine slows all of them; the table shows medians over the rounds, and shares as medians of the rounds'
own shares. Contiguous pages form one span; scattered ones lie at random on both sides. Every measurement takes other
pages than those before it, so none finds them in the caches because of its place in the round. The plain stream is sent
and received in pieces of 128 KB, which iperf3 does too. Scattered pages stand beside plain copies, one after the other,
of private memory that is scattered in the same way: what the memory itself makes of such an order.

`disk` takes pages that were written before, most likely out of the system's page cache, and always verifies them. What
is offered together stands in a pack in its order, wherever in the pool it lay, so pages scattered in both pools are
scattered in ours only; `disk mixed` are pages out of as many offers as there are pages, the worst that can be. How long
writing took stands in a table of its own.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from benchmarks.pages import ADDRESS, LAYOUT, SECRET, Fresh, PageLists, contiguous, human
from benchmarks.peer_process import peer
from benchmarks.report import Cell, Report, Table, add_report_options, configuration, finish
from benchmarks.rounds import Ways, measure
from benchmarks.timed_fetch import timed_fetch
from benchmarks.transfer_peer import STREAM_PIECE_BYTES, TransferPeerReady
from transfer.fetcher import FetchJob, PageFetcher, TransportName
from transfer.memory import SharedMemory


class Receiver:
    """Our pool with one fetcher per transport, the private memory of the memcpy, and the plain stream's socket."""

    def __init__(self, ready: TransferPeerReady, folder: Path) -> None:
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

    def memcpy(self, pages: PageLists) -> float:
        """Seconds for contiguous pages, in one piece."""
        start, size = pages[0][0] * self.page_bytes, len(pages[0]) * self.page_bytes
        begin = time.perf_counter()
        self.target[start : start + size] = self.source[start : start + size]
        return time.perf_counter() - begin

    def memcpy_each(self, pages: PageLists) -> float:
        """Seconds for pages anywhere, one after the other."""
        source, target = (memory.reshape(-1, self.page_bytes) for memory in (self.source, self.target))
        pairs = [(target[there], source[here]) for here, there in zip(*pages, strict=True)]
        begin = time.perf_counter()
        for there, here in pairs:
            there[...] = here
        return time.perf_counter() - begin

    def plain_stream(self, pages: PageLists) -> float:
        """Seconds for contiguous pages, from the request to the last byte."""
        first, nbytes = pages[0][0] * self.page_bytes, len(pages[0]) * self.page_bytes
        view, done = self.memory.view[first : first + nbytes], 0
        begin = time.perf_counter()
        self.socket.sendall(first.to_bytes(8, "big") + nbytes.to_bytes(8, "big"))
        while done < nbytes:
            done += self.socket.recv_into(view[done : done + STREAM_PIECE_BYTES])
        return time.perf_counter() - begin

    def touch_all(self) -> None:
        """Have every page of both pools taken from the system, and mapped wherever it will be read."""
        everything = list(range(len(self.checksums)))
        self.memcpy((everything, everything))
        for transport in self.fetchers:
            self.fetch(transport, (everything, everything), verified=True)

    def fetch(self, transport: str, pages: PageLists, *, verified: bool) -> float:
        """Seconds from the call of `fetch` to that of `on_done`. Raises `RuntimeError` when the fetch fails."""
        source, target = pages
        checksums = [self.checksums[page] for page in source] if verified else []
        job = FetchJob(key=0, peer=ADDRESS, source_pages=source, target_pages=target, checksums=checksums)
        return timed_fetch(self.fetchers[transport], job, transport=transport)

    def close(self) -> None:
        for fetcher in self.fetchers.values():
            fetcher.close()
        self.socket.close()
        self.memory.close()


def ways_to_move(receiver: Receiver, count: int) -> Ways:
    """Every way to move `count` pages, contiguous and scattered ones."""
    pages = Fresh(count, len(receiver.checksums))
    ways: Ways = {
        "memcpy": lambda: receiver.memcpy(pages.contiguous()),
        "stream": lambda: receiver.plain_stream(pages.contiguous()),
        "memcpy scattered": lambda: receiver.memcpy_each(pages.scattered()),
    }

    def fetched(transport: str, choose: Callable[[], PageLists], verified: bool) -> float:
        return receiver.fetch(transport, choose(), verified=verified)

    for kind, choose in (("", pages.contiguous), (" scattered", pages.scattered)):
        for transport in ("shm", "tcp"):
            ways[transport + kind] = partial(fetched, transport, choose, False)
            ways[f"{transport} verified{kind}"] = partial(fetched, transport, choose, True)
    for kind, choose in (("", pages.contiguous), (" scattered", pages.in_order), (" mixed", pages.scattered)):
        ways["disk" + kind] = partial(fetched, "disk", choose, True)
    return ways


def bandwidth(receiver: Receiver, sizes: Sequence[int], *, rounds: int) -> list[Table]:
    """Contiguous pages beside what they are compared with, and scattered ones beside contiguous ones; all ways take
    turns in every round."""
    compared = {"shm": "memcpy", "shm verified": "memcpy", "tcp": "stream", "tcp verified": "stream"}
    moved_apart = {way: f"{way} scattered" for way in ("memcpy", *compared, "disk")}
    straight = Table(
        title="bandwidth in GB/s, contiguous pages",
        columns=["bytes", "memcpy", "stream", *chain(*((way, f"of {base}") for way, base in compared.items())), "disk"],
    )
    mixed = Table(
        title=f"bandwidth in GB/s, scattered pages of {receiver.page_bytes >> 10} KB, and shares of contiguous ones",
        columns=["bytes", *chain(*((way, "share") for way in (*moved_apart, "disk mixed")))],
    )
    receiver.touch_all()
    for nbytes in sizes:
        moved = measure(nbytes, ways_to_move(receiver, nbytes // receiver.page_bytes), rounds=rounds)
        cells: list[Cell] = []
        for way, base in compared.items():
            cells += [moved.speed(way), moved.share(way, base)]
        straight.add(human(nbytes), moved.speed("memcpy"), moved.speed("stream"), *cells, moved.speed("disk"))
        cells = []
        for way, apart in (*moved_apart.items(), ("disk", "disk mixed")):
            cells += [moved.speed(apart), moved.share(apart, way)]
        mixed.add(human(nbytes), *cells)
    return [straight, mixed]


def latency(receiver: Receiver, sizes: Sequence[int], *, rounds: int) -> Table:
    columns = ["bytes", "transport", "verified", "p50 us", "p90 us", "p99 us"]
    table = Table(title="latency: from the call of fetch to that of on_done", columns=columns)
    for nbytes in sizes:
        pages = contiguous(nbytes // receiver.page_bytes, 0)
        for transport in receiver.fetchers:
            for verified in (True,) if transport == "disk" else (False, True):
                times = [receiver.fetch(transport, pages, verified=verified) for _ in range(rounds)]
                cuts = statistics.quantiles(times, n=100)
                table.add(
                    human(nbytes), transport, "yes" if verified else "no", *(cuts[cut] * 1e6 for cut in (49, 89, 98))
                )
    return table


def spooling(nbytes: int, seconds: float) -> Table:
    table = Table(title="writing pages to the folder, once", columns=["bytes", "disk write GB/s"])
    table.add(human(nbytes), nbytes / seconds / 1e9)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-kb", type=int, default=16, help="page size in KB (default: %(default)s)")
    parser.add_argument("--max-mb", type=int, default=256, help="largest transfer in MB (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="per bandwidth, the median counts (default: %(default)s)"
    )
    parser.add_argument("--latency-rounds", type=int, default=500, help="per latency (default: %(default)s)")
    parser.add_argument("--folder", help="where `disk` keeps its pages (default: the system's for temporary files)")
    add_report_options(parser)
    options = parser.parse_args()
    page_bytes = options.page_kb << 10
    sizes = [size for size in (64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20) if size <= options.max_mb << 20]
    num_pages = max(sizes) // page_bytes
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as name,
        peer("benchmarks.transfer_peer", page_bytes, num_pages, name, ready=TransferPeerReady) as ready,
    ):
        receiver = Receiver(ready, Path(name))
        tables = [
            latency(receiver, sizes[:2], rounds=options.latency_rounds),
            *bandwidth(receiver, sizes, rounds=options.rounds),
        ]
        tables.append(spooling(max(sizes), ready.spool_seconds))
        receiver.close()
    report = Report(
        name="transfer",
        purpose="Pages moved by each transport, against a single-threaded memcpy and a plain loopback TCP stream.",
        configuration=configuration(options),
        tables=tables,
    )
    finish(report, options)


if __name__ == "__main__":
    main()
