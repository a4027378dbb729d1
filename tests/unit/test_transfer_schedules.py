"""Thousands of random schedules of fetch, cancel, deadline, detach, attach and faults, against real sockets and shared
memory.

The oracle knows who owns each of our pages. It finds a byte written outside the pages of a fetch, a byte written
after a fetch was answered, a fetch answered twice or never, and wrong pages called right. Copies are cut into pieces
of a few pages, and the schedule can hold them between two pieces while it does something else.
"""

from __future__ import annotations

import logging
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_pools import LAYOUT, SECRET, WAIT_S, FakeClock, ServedPool, closing, pattern

from transfer.faults import InjectedFault
from transfer.fetcher import FetchJob, PageFetcher
from transfer.memory import SharedMemory

PAGE, SOURCE_PAGES, OUR_PAGES = 256, 24, 40
BOOTS = (1, 2, 3)

operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("fetch"), st.sampled_from(BOOTS), st.integers(0, 12), st.booleans(), st.sampled_from([None, 1, 50])
        ),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("detach"), st.sampled_from(BOOTS)),
        st.tuples(st.just("attach"), st.sampled_from(BOOTS)),
        st.tuples(st.just("time"), st.integers(1, 30)),
        st.tuples(st.just("reclaim"), st.integers(0, 20)),
        st.tuples(st.sampled_from(["hold", "go", "snap", "corrupt", "mend"])),
    ),
    max_size=25,
)


@pytest.fixture(scope="module")
def pools():
    with closing(*(ServedPool(boot=boot, page_bytes=PAGE, num_pages=SOURCE_PAGES) for boot in BOOTS)) as pools:
        yield {pool.address.boot: pool for pool in pools}


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transfer.shm._VERIFIED_BLOCK_BYTES", 3 * PAGE)
        patch.setattr("transfer.shm._PLAIN_BLOCK_BYTES", 2 * PAGE)
        patch.setattr("transfer.tcp_connection._CALL_BYTES", 300)
        patch.setattr("transfer.tcp_connection._TURN_BYTES", 1000)
        patch.setattr("transfer.serving._CALL_BYTES", 700)
        patch.setattr("transfer.serving._TURN_BYTES", 2000)
        yield


class Whims:
    """Faults that the schedule turns on and off."""

    def __init__(self):
        self.mode = "mend"
        self.going = threading.Event()
        self.going.set()
        self.held = threading.Event()  # some copy is at the gate

    def before_copy(self, site):
        if not self.going.is_set():
            self.held.set()
            assert self.going.wait(WAIT_S)
        if self.mode == "break" and site.done_bytes >= 2 * PAGE:
            raise InjectedFault("broken on purpose")

    def after_copy(self, site, landed):
        if self.mode == "corrupt":
            landed[0] ^= 1


class World:
    """Our pool, its fetcher, and what must be true of each page."""

    def __init__(self, pools, transport, num_threads, **options):
        self.pools = pools
        self.clock = FakeClock()
        self.whims = Whims()
        self.memory = SharedMemory(PAGE * OUR_PAGES, prefault=False)
        self.fetcher = PageFetcher(
            memory=self.memory,
            page_bytes=PAGE,
            layout=LAYOUT,
            secret=SECRET,
            transport=transport,
            num_threads=num_threads,
            clock=self.clock,
            faults=self.whims,
            **options,
        )
        for boot in BOOTS:
            self.attach(boot)
        self.settled = {page: bytes(PAGE) for page in range(OUR_PAGES)}  # pages nobody writes to, and their bytes
        self.running = {}  # key -> (job, its pool)
        self.answers = {}  # key -> (result, its pages' bytes when it was answered)
        self.num_answers = 0
        self.answered = threading.Condition()
        self.fetches = 0
        self.corrupted = False  # whether unverified pages may be wrong by now

    def run(self, operation):
        getattr(self, operation[0])(*operation[1:])

    def fetch(self, boot, count, verified, seconds):
        if len(self.settled) < count:
            return
        pool = self.pools[boot]
        targets = sorted(self.settled, key=lambda page: (page * 7 + self.fetches) % OUR_PAGES)[:count]
        sources = [(page * 5 + self.fetches) % SOURCE_PAGES for page in range(count // 2)]
        sources += range(count - len(sources))
        for page in targets:
            assert self.page(page) == self.settled.pop(page), "written to while nobody's"
        job = FetchJob(
            key=self.fetches,
            peer=pool.address,
            source_pages=sources,
            target_pages=targets,
            checksums=self.checksums(pool, sources, verified),
            deadline=float("inf") if seconds is None else self.clock() + seconds,
        )
        self.running[job.key] = job, pool
        self.fetches += 1
        self.fetcher.fetch(job, self.on_done)

    def checksums(self, pool, sources, verified):
        return pool.checksums(sources) if verified else []

    def on_done(self, result):
        job, _ = self.running[result.key]
        with self.answered:
            self.num_answers += 1
            self.answers[result.key] = result, [self.page(page) for page in job.target_pages]
            self.answered.notify_all()

    def settle(self, key):
        """Wait for the answer and take the pages back."""
        self.go()
        with self.answered:
            assert self.answered.wait_for(lambda: key in self.answers, WAIT_S), "never answered"
            result, landed = self.answers[key]
        job, pool = self.running.pop(key)
        for source, target, content in zip(job.source_pages, job.target_pages, landed, strict=True):
            self.settled[target] = content
            if result.ok and (job.checksums or not self.corrupted):
                assert content == pool.page(source), "wrong pages called right"
        assert result.ok == (result.error is None)

    def cancel(self, index):
        self.meet()
        if self.running:
            self.fetcher.cancel(list(self.running)[index % len(self.running)])

    def detach(self, boot):
        self.meet()
        self.fetcher.detach(self.pools[boot].address)

    def attach(self, boot):
        self.fetcher.attach(self.pools[boot].address, self.pools[boot].ticket)

    def time(self, seconds):
        self.clock.advance(seconds)

    def meet(self):
        """Give a copy that is to be held the time to come to the gate; it is no matter if none does."""
        if not self.whims.going.is_set() and self.running:
            self.whims.held.wait(0.002)

    def hold(self):
        self.whims.held.clear()
        self.whims.going.clear()

    def go(self):
        self.whims.going.set()

    def corrupt(self):
        self.whims.mode = "corrupt"
        self.corrupted = True

    def snap(self):
        self.whims.mode = "break"

    def reclaim(self, index):
        if self.running:
            self.settle(list(self.running)[index % len(self.running)])

    def mend(self):
        self.whims.mode = "mend"

    def page(self, page):
        return bytes(self.memory.view[page * PAGE : (page + 1) * PAGE])

    def close(self):
        self.go()
        self.fetcher.close()
        for key in list(self.running):
            self.settle(key)
        assert self.num_answers == len(self.answers) == self.fetches
        assert len(self.settled) == OUR_PAGES
        for page, content in self.settled.items():
            assert self.page(page) == content, "written to while nobody's"
        self.memory.close()


@pytest.mark.parametrize(("transport", "examples"), [("auto", 1000), ("shm", 1000), ("tcp", 1000)])
@pytest.mark.filterwarnings("error")  # also of a thread that died
def test_random_schedules(pools, transport, examples, caplog):
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(operations, st.integers(1, 3))
    def schedules(schedule, num_threads):
        world = World(pools, transport, num_threads)
        try:
            for operation in schedule:
                world.run(operation)
        finally:
            world.close()

    before = threading.active_count()
    schedules()
    assert threading.active_count() == before
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    for boot, pool in pools.items():
        assert bytes(pool.memory.view) == pattern(boot, PAGE * SOURCE_PAGES).tobytes()
