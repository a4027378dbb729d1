"""How fast pages move through process groups, against gloo's own send and receive of one contiguous span.

    python -m benchmarks.process_groups [--link-gbit 10] [--write]

A process of its own plays the peer. Every round measures all ways one after the other, plain gloo among them, so that a
busy machine slows all of them; shares are medians of the rounds' own shares. Plain gloo has both replicas in the group
themselves, which is what `transfer/dist` avoids. With `--link-gbit` the peer is behind a link of that speed, as on a
host of its own, but for the processors, which both ends still share.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from benchmarks.pages import ADDRESS, BOOT, LAYOUT, SECRET, contiguous, human, scattered
from benchmarks.peer_process import PeerReady, filled_pool, peer, read_secret, say_ready, serve_pool
from benchmarks.report import Report, Table, add_report_options, configuration, finish
from benchmarks.rounds import Ways, measure
from benchmarks.slow_link import LOOPBACK, Link, slow_link
from benchmarks.stats import median, milliseconds
from benchmarks.timed_fetch import timed_fetch
from transfer.checksum import page_checksums
from transfer.doors import DoorParts, open_doors
from transfer.fetcher import FetchJob, PageFetcher
from transfer.memory import SharedMemory
from transfer.transport import TransferTimings

_TIMEOUT = timedelta(minutes=5)


class GroupPeerReady(PeerReady):
    store_port: int


class PlainGloo:
    """One side of a group that the process itself is in; `memory` is sent from or received into."""

    def __init__(self, memory: SharedMemory, store: TCPStore, rank: int, host: str) -> None:
        gloo: Any = torch.distributed.ProcessGroupGloo  # torch's stubs leave most of it out
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = _TIMEOUT
        self._group = gloo(store, rank, 2, options)
        self._bytes = torch.frombuffer(memory.view, dtype=torch.uint8)
        self._length = torch.zeros(1, dtype=torch.int64)

    def serve(self) -> None:
        """Answer each length with as many bytes, until 0 is asked for."""
        while True:
            self._group.recv([self._length], 1, 0).wait()
            if not self._length:
                return
            self._group.send([self._bytes[: int(self._length)]], 1, 1).wait()

    def take(self, nbytes: int) -> float:
        """Seconds from the request for `nbytes` to the last of them."""
        begin = time.perf_counter()
        self._length[0] = nbytes
        request = self._group.send([self._length], 0, 0)
        if nbytes:
            self._group.recv([self._bytes[:nbytes]], 0, 1).wait()
        request.wait()
        return time.perf_counter() - begin


def serve(page_bytes: int, num_pages: int, host: str) -> None:
    """Be the peer, at `host`, until plain gloo is told to end."""
    secret = read_secret()
    memory = filled_pool(page_bytes * num_pages)
    parts = DoorParts(
        memory=memory,
        page_bytes=page_bytes,
        num_pages=num_pages,
        replica_id=ADDRESS.replica_id,
        boot=BOOT,
        secret=secret,
        host=host,
        bind_host=host,
    )
    doors = open_doors("gloo", parts)
    server = serve_pool(memory, page_bytes=page_bytes, num_pages=num_pages, secret=secret, doors=doors, host=host)
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
    checksums = page_checksums(memory.view, page_bytes, range(num_pages))
    say_ready(GroupPeerReady(ticket=server.ticket(), store_port=store.port, checksums=checksums))
    PlainGloo(memory, store, 0, host).serve()
    server.close()
    for door in doors:
        door.close(timeout_s=10)


def fetch(fetcher: PageFetcher, source: Sequence[int], target: Sequence[int], checksums: Sequence[int]) -> float:
    """Seconds from the call of `fetch` to that of `on_done`. Raises `RuntimeError` unless gloo did it."""
    job = FetchJob(key=0, peer=ADDRESS, source_pages=source, target_pages=target, checksums=checksums)
    return timed_fetch(fetcher, job, transport="gloo")


def contacts(fetcher: PageFetcher, ready: GroupPeerReady, *, rounds: int) -> Table:
    """From the first word to a peer to its first page: right after a replica's start, and to a peer that it knew."""
    seconds = []
    for _ in range(1 + rounds):
        begin = time.perf_counter()
        fetcher.attach(ADDRESS, ready.ticket)
        fetch(fetcher, [0], [0], [])
        seconds.append(time.perf_counter() - begin)
        fetcher.detach(ADDRESS)
    table = Table(title="a new group, until its first page", columns=["when", "ms"])
    table.add("as the replicas start, which load torch", milliseconds(seconds[0]))
    table.add(f"then (median of {rounds})", milliseconds(median(seconds[1:])))
    return table


def groups(ready: GroupPeerReady, link: Link, sizes: list[int], *, rounds: int) -> list[Table]:
    """New groups; then pages, a row for each size."""
    ticket, size = ready.ticket, ready.ticket.page_bytes
    columns = ["bytes", "plain gloo", "pages", "of plain", "verified", "of plain", "scattered", "of contiguous"]
    table = Table(title=f"bandwidth in GB/s, pages of {size >> 10} KB", columns=columns)
    with SharedMemory(ticket.num_pages * size, shared_writable=True) as memory:
        store = TCPStore(link.there, ready.store_port, is_master=False, timeout=_TIMEOUT)
        plain = PlainGloo(memory, store, 1, link.here)
        fetcher = PageFetcher(
            memory=memory,
            page_bytes=size,
            layout=LAYOUT,
            secret=SECRET,
            transport="gloo",
            timings=TransferTimings(patience_s=_TIMEOUT.total_seconds()),
        )
        found = [contacts(fetcher, ready, rounds=rounds), table]
        fetcher.attach(ADDRESS, ticket)
        for nbytes in sizes:
            straight, mixed = (choose(nbytes // size, ticket.num_pages) for choose in (contiguous, scattered))
            checksums = [ready.checksums[page] for page in straight[0]]
            ways: Ways = {
                "plain": partial(plain.take, nbytes),
                "pages": partial(fetch, fetcher, *straight, []),
                "verified": partial(fetch, fetcher, *straight, checksums),
                "scattered": partial(fetch, fetcher, *mixed, []),
            }
            moved = measure(nbytes, ways, rounds=rounds)
            table.add(human(nbytes), *moved.cells("plain", pages="plain", verified="plain", scattered="pages"))
        fetcher.close()
        plain.take(0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=3, metavar=("PAGE_BYTES", "PAGES", "HOST"), help="be the peer (internal)")
    parser.add_argument("--link-gbit", type=float, help="speed of a link to the peer (default: over the loopback)")
    parser.add_argument("--page-kb", type=int, default=16, help="page size in KB (default: %(default)s)")
    parser.add_argument("--max-mb", type=int, default=256, help="largest transfer in MB (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="the median counts (default: %(default)s)")
    add_report_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        page_bytes, num_pages, host = int(options.serve[0]), int(options.serve[1]), options.serve[2]
        serve(page_bytes, num_pages, host)
        return
    page_bytes = options.page_kb << 10
    sizes = [size for size in (64 << 10, 1 << 20, 16 << 20, 64 << 20, 256 << 20) if size <= options.max_mb << 20]
    num_pages = max(sizes) // page_bytes
    with ExitStack() as stack:
        link = stack.enter_context(slow_link(options.link_gbit)) if options.link_gbit else LOOPBACK
        served = ("--serve", page_bytes, num_pages, link.there)
        ready = stack.enter_context(peer("benchmarks.process_groups", *served, ready=GroupPeerReady, link=link))
        tables = groups(ready, link, sizes, rounds=options.rounds)
    report = Report(
        name="process-groups",
        purpose="Pages moved through gloo's process groups, against gloo's own send and receive of one span.",
        configuration=configuration(options, but=("serve",)),
        tables=tables,
    )
    finish(report, options)


if __name__ == "__main__":
    main()
