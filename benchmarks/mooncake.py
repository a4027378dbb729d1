"""How fast pages move over mooncake-transfer-engine's TCP, against what the library itself reaches.

    python -m benchmarks.mooncake [--write]

A process of its own plays the peer. The library's own number is its blocking read of one span of as many bytes, in this
process and into private memory. Scattered pages of a size that costs too much there go by our own TCP, which is what
`transport: mooncake` does. The ways take turns; the table shows medians, and shares as medians of the rounds' own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import numpy as np

from benchmarks.pages import ADDRESS, LAYOUT, SECRET, contiguous, human, scattered
from benchmarks.peer_process import PeerReady, filled_pool, peer, read_secret, say_ready, serve_pool, wait_for_end
from benchmarks.report import Report, Table, add_report_options, configuration, finish
from benchmarks.rounds import Ways, measure
from benchmarks.timed_fetch import timed_fetch
from transfer.checksum import page_checksums
from transfer.fetcher import FetchJob, PageFetcher
from transfer.memory import SharedMemory
from transfer.mooncake.door import MooncakeDoor
from transfer.mooncake.library import new_engine
from transfer.mooncake.messages import DoorAddress


def serve(page_bytes: int, num_pages: int) -> None:
    """Be the peer until standard input ends."""
    secret = read_secret()
    memory = filled_pool(page_bytes * num_pages)
    door = MooncakeDoor(memory=memory, host="127.0.0.1")
    server = serve_pool(memory, page_bytes=page_bytes, num_pages=num_pages, secret=secret, doors=[door])
    checksums = page_checksums(memory.view, page_bytes, range(num_pages))
    say_ready(PeerReady(ticket=server.ticket(), checksums=checksums))
    wait_for_end()
    server.close()
    door.close(timeout_s=10)


class Receiver:
    """Our pool with its fetcher, and the bare library with private memory."""

    def __init__(self, ready: PeerReady) -> None:
        ticket = ready.ticket
        self.page_bytes = ticket.page_bytes
        self.checksums = ready.checksums
        self.memory = SharedMemory(ticket.num_pages * ticket.page_bytes)
        self.fetcher = PageFetcher(
            memory=self.memory, page_bytes=ticket.page_bytes, layout=LAYOUT, secret=SECRET, transport="mooncake"
        )
        self.fetcher.attach(ADDRESS, ticket)
        self.door = msgspec.json.decode(ticket.doors["mooncake"], type=DoorAddress)
        self.private = np.zeros(self.memory.nbytes, dtype=np.uint8)
        self.library = new_engine(host="127.0.0.1", ib_device="")

    def library_read(self, count: int) -> float:
        """Seconds for `count` pages as one span. Raises `RuntimeError` when the library fails."""
        nbytes, begin = count * self.page_bytes, time.perf_counter()
        if self.library.transfer_sync_read(self.door.session, self.private.ctypes.data, self.door.base, nbytes) != 0:
            raise RuntimeError("the library's own read failed")
        return time.perf_counter() - begin

    def fetch(
        self, pages: tuple[list[int], list[int]], *, verified: bool = False, transport: str = "mooncake"
    ) -> float:
        """Seconds from the call of `fetch` to that of `on_done`. Raises `RuntimeError` when another than `transport`
        did it."""
        source, target = pages
        checksums = [self.checksums[page] for page in source] if verified else []
        job = FetchJob(key=0, peer=ADDRESS, source_pages=source, target_pages=target, checksums=checksums)
        return timed_fetch(self.fetcher, job, transport=transport)

    def close(self) -> None:
        self.fetcher.close()
        self.memory.close()


def bandwidth(receiver: Receiver, sizes: Sequence[int], *, rounds: int) -> Table:
    columns = ["bytes", "library", "contiguous", "of library", "verified", "of library", "scattered", "of contiguous"]
    table = Table(title="bandwidth in GB/s; the library's own read is of one span", columns=columns)
    num_pages = len(receiver.checksums)
    for nbytes in sizes:
        count = nbytes // receiver.page_bytes
        ways: Ways = {
            "library": partial(receiver.library_read, count),
            "contiguous": partial(receiver.fetch, contiguous(count, num_pages)),
            "verified": partial(receiver.fetch, contiguous(count, num_pages), verified=True),
            "scattered": partial(receiver.fetch, scattered(count, num_pages), transport="tcp"),
        }
        moved = measure(nbytes, ways, rounds=rounds)
        shares = moved.cells("library", contiguous="library", verified="library", scattered="contiguous")
        table.add(human(nbytes), *shares)
    return table


def latency(receiver: Receiver, sizes: Sequence[int], *, rounds: int) -> Table:
    table = Table(title="latency of a fetch, contiguous", columns=["bytes", "by", "p50 us", "p90 us", "p99 us"])
    for nbytes in sizes:
        count = nbytes // receiver.page_bytes
        ways: dict[str, Callable[[], float]] = {
            "library": partial(receiver.library_read, count),
            "fetch": partial(receiver.fetch, contiguous(count, count)),
        }
        for name, way in ways.items():
            cuts = statistics.quantiles([way() for _ in range(rounds)], n=100)
            table.add(human(nbytes), name, *(cuts[cut] * 1e6 for cut in (49, 89, 98)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=2, type=int, metavar=("PAGE_BYTES", "PAGES"), help="be the peer (internal)")
    parser.add_argument("--page-kb", type=int, default=16, help="page size in KB (default: %(default)s)")
    parser.add_argument("--max-mb", type=int, default=256, help="largest transfer in MB (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="per bandwidth (default: %(default)s)")
    parser.add_argument("--latency-rounds", type=int, default=200, help="per latency (default: %(default)s)")
    add_report_options(parser)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    page_bytes = options.page_kb << 10
    sizes = [size for size in (64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20) if size <= options.max_mb << 20]
    num_pages = max(sizes) // page_bytes
    with peer("benchmarks.mooncake", "--serve", page_bytes, num_pages, ready=PeerReady) as ready:
        receiver = Receiver(ready)
        tables = [
            latency(receiver, sizes[:2], rounds=options.latency_rounds),
            bandwidth(receiver, sizes, rounds=options.rounds),
        ]
        receiver.close()
    report = Report(
        name="mooncake",
        purpose="Pages moved over mooncake-transfer-engine's TCP, against the library's own read of one span.",
        configuration=configuration(options, but=("serve",)),
        tables=tables,
    )
    finish(report, options)


if __name__ == "__main__":
    main()
