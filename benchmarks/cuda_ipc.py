"""How fast pages move between two processes' pools in GPU memory, against a copy within the GPU.

    python -m benchmarks.cuda_ipc [--write]

A process of its own plays the peer, on the same GPU. Every round measures all ways one after the other; shares are
medians of the rounds' own shares. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial

from benchmarks.pages import ADDRESS, LAYOUT, SECRET, contiguous, human, scattered
from benchmarks.peer_process import PeerReady, known_bytes, peer, read_secret, say_ready, wait_for_end
from benchmarks.report import Report, Table, add_report_options, configuration, finish
from benchmarks.rounds import Ways, measure
from benchmarks.timed_fetch import timed_fetch
from transfer.checksum import page_checksums
from transfer.cuda.door import CudaDoor, device_ticket
from transfer.cuda.library import CudaDriver, CudaUnavailable
from transfer.cuda.memory import DeviceMemory
from transfer.fetcher import FetchJob, PageFetcher


class DeviceCopy:
    """Copies within our GPU: what the transport is compared with."""

    def __init__(self, cuda: CudaDriver, nbytes: int) -> None:
        self._cuda = cuda
        self._source, self._target = DeviceMemory(cuda, nbytes), DeviceMemory(cuda, nbytes)
        self._stream, self._event = cuda.new_stream(), cuda.new_event()

    def run(self, nbytes: int) -> float:
        """Seconds for `nbytes`, from the call to the event."""
        begin = time.perf_counter()
        self._cuda.copy(self._target.address, self._source.address, nbytes, self._stream)
        self._cuda.record(self._event, self._stream)
        while not self._cuda.is_done(self._event):
            pass
        return time.perf_counter() - begin


def serve(page_bytes: int, num_pages: int) -> None:
    """Be the peer until standard input ends."""
    read_secret()  # nobody asks for it: pages are reached by their handles
    memory = DeviceMemory(CudaDriver(), page_bytes * num_pages)
    content = bytearray(known_bytes(memory.nbytes))
    memory.write(0, content)
    ticket = device_ticket(CudaDoor(memory), num_pages=num_pages, page_bytes=page_bytes, layout=LAYOUT)
    checksums = page_checksums(memoryview(content), page_bytes, range(num_pages))
    say_ready(PeerReady(ticket=ticket, checksums=checksums))
    wait_for_end()


def fetch(fetcher: PageFetcher, source: Sequence[int], target: Sequence[int], checksums: Sequence[int]) -> float:
    """Seconds from the call of `fetch` to that of `on_done`. Raises `RuntimeError` unless CUDA IPC did it."""
    job = FetchJob(key=0, peer=ADDRESS, source_pages=source, target_pages=target, checksums=checksums)
    return timed_fetch(fetcher, job, transport="cuda")


def bandwidth(cuda: CudaDriver, ready: PeerReady, sizes: list[int], *, rounds: int) -> Table:
    """A row for each size."""
    ticket, size = ready.ticket, ready.ticket.page_bytes
    columns = ["bytes", "copy GB/s", "pages GB/s", "share", "scattered GB/s", "share", "verified GB/s", "share"]
    table = Table(title=f"bandwidth, pages of {size >> 10} KB", columns=columns)
    plain = DeviceCopy(cuda, ticket.num_pages * size)
    memory = DeviceMemory(cuda, ticket.num_pages * size)
    fetcher = PageFetcher(memory=memory, page_bytes=size, layout=LAYOUT, secret=SECRET, transport="cuda")
    fetcher.attach(ADDRESS, ticket)
    for nbytes in sizes:
        straight, mixed = (choose(nbytes // size, ticket.num_pages) for choose in (contiguous, scattered))
        checksums = [ready.checksums[page] for page in straight[0]]
        ways: Ways = {
            "plain": partial(plain.run, nbytes),
            "pages": partial(fetch, fetcher, *straight, []),
            "scattered": partial(fetch, fetcher, *mixed, []),
            "verified": partial(fetch, fetcher, *straight, checksums),
        }
        moved = measure(nbytes, ways, rounds=rounds)
        table.add(human(nbytes), *moved.cells("plain", pages="plain", scattered="plain", verified="plain"))
    fetcher.close()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=2, type=int, metavar=("PAGE_BYTES", "PAGES"), help="be the peer (internal)")
    parser.add_argument("--page-kb", type=int, default=64, help="page size in KB (default: %(default)s)")
    parser.add_argument("--max-mb", type=int, default=1024, help="largest transfer in MB (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="the median counts (default: %(default)s)")
    add_report_options(parser)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    try:
        cuda = CudaDriver()
    except CudaUnavailable as error:
        print(f"skipped: {error}")
        return
    page_bytes = options.page_kb << 10
    sizes = [size for size in (1 << 20, 16 << 20, 256 << 20, 1 << 30) if size <= options.max_mb << 20]
    num_pages = max(sizes) // page_bytes
    with peer("benchmarks.cuda_ipc", "--serve", page_bytes, num_pages, ready=PeerReady) as ready:
        table = bandwidth(cuda, ready, sizes, rounds=options.rounds)
    report = Report(
        name="cuda-ipc",
        purpose="Pages moved between two processes' pools in GPU memory, against a copy within the GPU.",
        configuration=configuration(options, but=("serve",)),
        tables=[table],
    )
    finish(report, options)


if __name__ == "__main__":
    main()
