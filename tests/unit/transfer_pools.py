"""Pools, clocks and faults for the tests of transfer/.

A pool's pages are filled from its boot number, so that a page of another life, place or peer is never mistaken for the
right one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from protocol.handshake import PoolShape
from protocol.rooms import PeerAddress
from transfer.checksum import page_checksums
from transfer.choice import TransportName, is_written_by_helpers
from transfer.doors import DoorParts, open_doors
from transfer.faults import CopySite, InjectedFault
from transfer.fetcher import FetchJob, FetchResult, PageFetcher
from transfer.int8_codec import Int8Codec
from transfer.memory import SharedMemory
from transfer.server import PageServer
from transfer.transport import TransferTimings

SECRET = b"the cluster secret of the tests"
LAYOUT = "layout of the tests"
WAIT_S = 30.0
"""Only ever waited for by a test that fails."""


class FakeClock:
    """Stands still until it is advanced."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def pattern(boot: int, nbytes: int) -> np.ndarray:
    """What the pool of `boot` holds, uint8 [nbytes]."""
    return np.random.default_rng(boot).integers(0, 256, nbytes, dtype=np.uint8)


class ServedPool:
    """A peer in this process: memory full of its pattern, and a server."""

    def __init__(
        self,
        *,
        boot: int,
        page_bytes: int = 4096,
        num_pages: int = 64,
        secret: bytes = SECRET,
        timings: TransferTimings | None = None,
        clock: Callable[[], float] | None = None,
        transport: TransportName = "auto",
        folder: Path | None = None,
        shape: PoolShape | None = None,
        codec: Int8Codec | None = None,
    ) -> None:
        self.page_bytes = page_bytes
        self.memory = SharedMemory(page_bytes * num_pages)
        np.frombuffer(self.memory.view, dtype=np.uint8)[:] = pattern(boot, self.memory.nbytes)
        extra = {} if clock is None else {"clock": clock}
        self.doors = open_doors(
            transport,
            DoorParts(
                memory=self.memory,
                page_bytes=page_bytes,
                num_pages=num_pages,
                replica_id=f"replica-{boot}",
                boot=boot,
                secret=secret,
                host="127.0.0.1",
                bind_host="127.0.0.1",
                folder=folder,
            ),
        )
        self.server = PageServer(
            memory=self.memory,
            page_bytes=page_bytes,
            num_pages=num_pages,
            layout=LAYOUT,
            shape=shape,
            codec=codec,
            host="127.0.0.1",
            boot=boot,
            secret=secret,
            timings=timings,
            doors=self.doors,
            **extra,
        )
        self.address = PeerAddress(f"replica-{boot}", boot, "127.0.0.1", 1)
        self.ticket = self.server.ticket()

    def checksums(self, pages: Sequence[int]) -> list[int]:
        return page_checksums(self.memory.view, self.page_bytes, pages)

    def page(self, page: int) -> bytes:
        return bytes(self.memory.view[page * self.page_bytes : (page + 1) * self.page_bytes])

    def close(self) -> None:
        self.server.close()
        for door in self.doors:
            door.close(timeout_s=WAIT_S)
        self.memory.close()


class Receiver:
    """A fetcher over memory of zeroes, and the answers it gave."""

    def __init__(
        self, *, page_bytes: int = 4096, num_pages: int = 64, secret: bytes = SECRET, layout: str = LAYOUT, **options
    ) -> None:
        self.page_bytes = page_bytes
        writable = is_written_by_helpers(options.get("transport", "auto"))
        memory = options.pop("memory", None)
        if isinstance(options.get("faults"), Gate):
            options.setdefault("at_once_bytes", 0)  # or it would hold the test's own thread
        self.memory = memory or SharedMemory(page_bytes * num_pages, shared_writable=writable)
        self.fetcher = PageFetcher(memory=self.memory, page_bytes=page_bytes, layout=layout, secret=secret, **options)
        self.results: dict[object, FetchResult] = {}
        self.answers = 0
        self._changed = threading.Condition()

    def start(
        self,
        peer: PeerAddress,
        source: Sequence[int],
        target: Sequence[int],
        *,
        key: object = "job",
        checksums: Sequence[int] = (),
        deadline: float = float("inf"),
        grain_tokens: int = 0,
    ) -> None:
        self.results.pop(key, None)
        job = FetchJob(
            key=key,
            peer=peer,
            source_pages=source,
            target_pages=target,
            checksums=checksums,
            deadline=deadline,
            grain_tokens=grain_tokens,
        )
        self.fetcher.fetch(job, self._done)

    def wait(self, key: object = "job", *, within_s: float = WAIT_S) -> FetchResult:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self.results, within_s), f"no answer for {key}"
            return self.results[key]

    def wait_turning(self, clock: FakeClock, *, seconds: float, key: object = "job") -> FetchResult:
        """Wait while the clock runs on, `seconds` at a time: for time limits that begin in other threads."""
        with self._changed:
            for _ in range(600):
                if self._changed.wait_for(lambda: key in self.results, 0.05):
                    return self.results[key]
                clock.advance(seconds)
        raise AssertionError(f"no answer for {key}")

    def fetch(
        self,
        peer: PeerAddress,
        source: Sequence[int],
        target: Sequence[int],
        *,
        within_s: float = WAIT_S,
        **options,
    ) -> FetchResult:
        self.start(peer, source, target, **options)
        return self.wait(options.get("key", "job"), within_s=within_s)

    def page(self, page: int) -> bytes:
        return bytes(self.memory.view[page * self.page_bytes : (page + 1) * self.page_bytes])

    def close(self) -> None:
        self.fetcher.close()
        self.memory.close()

    def _done(self, result: FetchResult) -> None:
        with self._changed:
            self.results[result.key] = result
            self.answers += 1
            self._changed.notify_all()


class Gate:
    """Faults that hold copies of chosen keys before their bytes are written, until the gate is opened."""

    def __init__(self, *, keys: set[object] | None = None, transport: str | None = None, after_bytes: int = 0) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()
        self._keys = keys
        self._transport = transport
        self._after_bytes = after_bytes

    def open(self) -> None:
        self._open.set()

    def before_copy(self, site: CopySite) -> None:
        if self._keys is not None and site.key not in self._keys:
            return
        if self._transport not in (None, site.transport) or site.done_bytes < self._after_bytes:
            return
        self.reached.set()
        assert self._open.wait(WAIT_S), "the test forgot to open the gate"

    def after_copy(self, site: CopySite, landed: memoryview) -> None:
        pass


class Breaker:
    """Faults that fail every attempt on `broken` transports, and flip a bit of all that lands over `corrupting`
    ones."""

    def __init__(self, *, broken: set[str] = frozenset(), corrupting: set[str] = frozenset()) -> None:
        self.broken = set(broken)
        self.corrupting = set(corrupting)
        self.seen: list[str] = []

    def before_copy(self, site: CopySite) -> None:
        self.seen.append(site.transport)
        if site.transport in self.broken:
            raise InjectedFault(f"{site.transport} is broken on purpose")

    def after_copy(self, site: CopySite, landed: memoryview) -> None:
        if site.transport in self.corrupting:
            landed[0] ^= 1


class Bug:
    """Not a fault that anybody reckons with: over `transports` what landed is never verified."""

    def __init__(self, *, transports: set[str]) -> None:
        self.transports = transports

    def before_copy(self, site: CopySite) -> None:
        pass

    def after_copy(self, site: CopySite, landed: memoryview) -> None:
        if site.transport in self.transports:
            raise ValueError("a bug")


class Whims:
    """Faults that a schedule turns on and off."""

    def __init__(self, *, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.mode = "mend"
        self.going = threading.Event()
        self.going.set()
        self.held = threading.Event()  # some copy is at the gate
        self._schedules = threading.current_thread()  # which would never open it, and copies what is short itself

    def before_copy(self, site: CopySite) -> None:
        if not self.going.is_set() and threading.current_thread() is not self._schedules:
            self.held.set()
            assert self.going.wait(WAIT_S)
        if self.mode == "break" and site.done_bytes >= 2 * self.page_bytes:
            raise InjectedFault("broken on purpose")

    def after_copy(self, site: CopySite, landed: memoryview) -> None:
        if self.mode == "corrupt":
            landed[len(landed) // 2] ^= 1


@contextlib.contextmanager
def closing(*things) -> Iterator[tuple]:
    """`close` all of them at the end, the last first."""
    with contextlib.ExitStack() as stack:
        for thing in things:
            stack.callback(thing.close)
        yield things


def until(condition: Callable[[], bool], *, within_s: float = WAIT_S) -> None:
    """Wait for what gives no notice."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def freeze(pid: int) -> None:
    """SIGSTOP, and wait until it has taken effect."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def open_fds() -> dict[str, str]:
    """What this process has open: descriptor to what it is."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found
