"""The world of random schedules: our pool, its fetcher, peers, faults, and the oracle that watches it all.

The oracle knows who owns each of our pages and what every peer's pages hold. It finds a byte written outside the pages
of a fetch, a byte written after a fetch was answered, a fetch answered twice or never, and wrong pages called right.
Copies are cut into pieces of a few pages, and a schedule can hold them between two pieces while it does something else.
Schedules are drawn and run by `transfer_schedules.py`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from transfer_pools import LAYOUT, SECRET, WAIT_S, FakeClock, Whims

from protocol.handshake import RegionTicket
from protocol.rooms import PeerAddress
from transfer.fetcher import FetchJob, FetchResult, PageFetcher
from transfer.memory import SharedMemory

PAGE, SOURCE_PAGES, OUR_PAGES = 256, 24, 40
SLOTS = (1, 2, 3)
"""Three peers; in the places of those that die others come."""

Operation = tuple[Any, ...]


class LawBroken(AssertionError):
    """What must always be true of transfers is not."""


class Source(Protocol):
    """A peer as the schedules see it."""

    address: PeerAddress
    ticket: RegionTicket

    def page(self, page: int) -> bytes: ...
    def checksums(self, pages: Sequence[int]) -> list[int]: ...


class World:
    """Our pool, its fetcher, and what must be true of each page. `break_law` may spoil the fetcher, for proving that
    the oracle notices. With `lands_verified` what is verified is so before it is in its place, and with `seals` all is,
    checksums or not."""

    weights: ClassVar[Mapping[str, int]] = {
        "fetch": 3, "cancel": 1, "detach": 1, "attach": 1, "time": 1, "reclaim": 1,
        "hold": 1, "go": 1, "snap": 1, "corrupt": 1, "mend": 1,
    }  # fmt: skip
    """How often each operation is chosen."""
    page_bytes = PAGE
    wait_s = WAIT_S
    """For an answer; as much time as a machine can need that has others to serve."""

    def __init__(
        self,
        peers: Mapping[int, Source],
        *,
        break_law: Callable[[PageFetcher], None] | None = None,
        lands_verified: bool = False,
        seals: bool = False,
        **options: Any,
    ) -> None:
        self.peers = peers
        self.lands_verified = lands_verified
        self.seals = seals
        self.clock = FakeClock()
        self.whims = Whims(page_bytes=self.page_bytes)
        options.setdefault("at_once_bytes", 0)  # threads can be held, the schedule's own cannot
        self.memory, self.view = self.make_memory(self.page_bytes * OUR_PAGES)
        self.fetcher = PageFetcher(
            memory=self.memory,
            page_bytes=self.page_bytes,
            layout=LAYOUT,
            secret=SECRET,
            clock=self.clock,
            faults=self.whims,
            **options,
        )
        if break_law is not None:
            break_law(self.fetcher)
        for slot in peers:
            self.attach(slot)
        self.settled = {
            page: bytes(self.page_bytes) for page in range(OUR_PAGES)
        }  # pages nobody writes to, and their bytes
        self.running: dict[int, tuple[FetchJob, Source]] = {}
        self.before: dict[int, list[bytes]] = {}  # what the pages of a fetch held
        self.answers: dict[int, tuple[FetchResult, list[bytes]]] = {}  # with the pages' bytes at that moment
        self.right: dict[str, int] = {}
        """Fetches that came to a good end, by the transport that did it."""
        self.num_answers = 0
        self.answered = threading.Condition()
        self.fetches = 0
        self.corrupted = False  # whether unverified pages may be wrong by now

    # ---- operations -------------------------------------------------------------------------------------------

    def draw(self, choose: random.Random) -> Operation:
        """The next operation of a schedule."""
        (kind,) = choose.choices(list(self.weights), list(self.weights.values()))
        match kind:
            case "fetch":
                slot, verified = choose.choice(SLOTS), choose.random() < 0.5
                return kind, slot, choose.randint(0, 12), verified, choose.choice([None, 1, 50])
            case "cancel" | "reclaim":
                return kind, choose.randint(0, 20)
            case "time":
                return kind, choose.randint(1, 30)
            case "hold" | "go" | "snap" | "corrupt" | "mend":
                return (kind,)
        return kind, choose.choice(SLOTS)

    def run(self, operation: Operation) -> None:
        getattr(self, operation[0])(*operation[1:])

    def fetch(self, slot: int, count: int, verified: bool, seconds: float | None) -> None:
        if len(self.settled) < count:
            return
        pool = self.peers[slot]
        targets = sorted(self.settled, key=lambda page: (page * 7 + self.fetches) % OUR_PAGES)[:count]
        sources = [(page * 5 + self.fetches) % SOURCE_PAGES for page in range(count // 2)]
        sources += range(count - len(sources))
        before = self.before[self.fetches] = [self.settled.pop(page) for page in targets]
        for page, content in zip(targets, before, strict=True):
            self.expect(self.page(page) == content, f"page {page} was written to while nobody's")
        job = FetchJob(
            key=self.fetches,
            peer=pool.address,
            source_pages=sources,
            target_pages=targets,
            checksums=self.checksums(pool, sources, verified),
            deadline=float("inf") if seconds is None else self.clock() + seconds,
        )
        self.running[self.fetches] = job, pool
        self.fetches += 1
        self.fetcher.fetch(job, self._on_done)

    def cancel(self, index: int) -> None:
        self.meet()
        if self.running:
            self.fetcher.cancel(list(self.running)[index % len(self.running)])

    def detach(self, slot: int) -> None:
        self.meet()
        self.fetcher.detach(self.peers[slot].address)

    def attach(self, slot: int) -> None:
        self.fetcher.attach(self.peers[slot].address, self.peers[slot].ticket)

    def time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def reclaim(self, index: int) -> None:
        if self.running:
            self.settle(list(self.running)[index % len(self.running)])

    def hold(self) -> None:
        self.whims.held.clear()
        self.whims.going.clear()

    def go(self) -> None:
        self.whims.going.set()

    def snap(self) -> None:
        self.whims.mode = "break"

    def corrupt(self) -> None:
        self.whims.mode = "corrupt"
        self.corrupted = True

    def mend(self) -> None:
        self.whims.mode = "mend"

    # ---- what kinds of worlds differ in -------------------------------------------------------------------------

    def make_memory(self, nbytes: int) -> tuple[Any, memoryview]:
        """Our pool's, and its bytes."""
        memory = SharedMemory(nbytes, prefault=False)
        return memory, memory.view

    def checksums(self, pool: Source, sources: Sequence[int], verified: bool) -> list[int]:
        """Those that a fetch is to verify."""
        return pool.checksums(sources) if verified else []

    def needs_time(self, pool: Source) -> bool:
        """Whether an answer may need the clock to go on."""
        return False

    # ---- the oracle ---------------------------------------------------------------------------------------------

    def settle(self, key: int) -> None:
        """Wait for the answer and take the pages back."""
        self.go()
        job, pool = self.running[key]
        with self.answered:
            for _ in range(int(self.wait_s / 0.005)):
                if self.answered.wait_for(lambda: key in self.answers, 0.005):
                    break
                if self.needs_time(pool):
                    self.clock.advance(0.5)
            self.expect(key in self.answers, f"fetch {key} was never answered")
            result, landed = self.answers[key]
        del self.running[key]
        pages = zip(job.source_pages, job.target_pages, self.before.pop(key), landed, strict=True)
        for source, target, before, content in pages:
            self.settled[target] = content
            if result.ok and (job.checksums or self.seals or not self.corrupted):
                self.expect(content == pool.page(source), f"page {target} of fetch {key} is wrong and called right")
            if self.lands_verified and job.checksums:
                right = content in (before, pool.page(source))
                self.expect(right, f"page {target} of fetch {key} was not verified before it was in its place")
        self.expect(result.ok == (result.error is None), f"fetch {key} ended with {result}")
        if result.ok and result.bytes:
            self.right[result.transport] = self.right.get(result.transport, 0) + 1

    def rest(self) -> None:
        """Let everything end, and look at all pages."""
        self.go()
        for key in list(self.running)[1::2]:
            self.fetcher.cancel(key)
        for key in list(self.running):
            self.settle(key)
        self.mend()
        self.check()

    def close(self) -> None:
        """Close the fetcher whatever it is doing, and look at all pages."""
        self.go()
        try:
            self.fetcher.close()
        except TimeoutError as error:
            raise LawBroken("never answered: " + str(error)) from error
        for key in list(self.running):
            self.settle(key)
        self.check()
        self.memory.close()

    def check(self) -> None:
        """With nothing running."""
        answered = self.num_answers == len(self.answers) == self.fetches
        self.expect(answered, f"{self.num_answers} answers for {self.fetches} fetches")
        self.expect(len(self.settled) == OUR_PAGES, "a page is still lent")
        for page, content in self.settled.items():
            self.expect(self.page(page) == content, f"page {page} was written to while nobody's")

    def expect(self, holds: bool, law: str) -> None:
        if not holds:
            raise LawBroken(law)

    def meet(self) -> None:
        """Give a copy that is to be held the time to come to the gate; it is no matter if none does."""
        if not self.whims.going.is_set() and self.running:
            self.whims.held.wait(0.002)

    def page(self, page: int) -> bytes:
        return bytes(self.view[page * self.page_bytes : (page + 1) * self.page_bytes])

    def _on_done(self, result: FetchResult) -> None:
        job, _ = self.running[result.key]
        with self.answered:
            self.num_answers += 1
            self.answers[result.key] = result, [self.page(page) for page in job.target_pages]
            self.answered.notify_all()
