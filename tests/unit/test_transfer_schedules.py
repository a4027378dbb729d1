"""Thousands of random schedules of fetches against real sockets and shared memory, in one process on an injected clock;
and schedules of fetchers that break a law, to show that the oracle finds them."""

from __future__ import annotations

import itertools
import random

import pytest
from parted_pool import OURS, THEIRS, PartedPool
from transfer_pools import ServedPool, closing, pattern
from transfer_schedules import run_schedules, unharmed
from transfer_world import PAGE, SLOTS, SOURCE_PAGES, LawBroken, World

from transfer.fetcher import FetchJob, PageFetcher
from transfer.jobs import FetchResult, OnDone


@pytest.fixture(scope="module")
def pools():
    with closing(*(ServedPool(boot=slot, page_bytes=PAGE, num_pages=SOURCE_PAGES) for slot in SLOTS)) as pools:
        yield {pool.address.boot: pool for pool in pools}


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transfer.grain_run._PACKED_BYTES", 3 * PAGE)
        patch.setattr("transfer.page_run._VERIFIED_BLOCK_BYTES", 3 * PAGE)
        patch.setattr("transfer.page_run._PLAIN_BLOCK_BYTES", 2 * PAGE)
        patch.setattr("transfer.page_run._STREAMED_BYTES", 5 * PAGE)
        patch.setattr("transfer.tcp_connection._CALL_BYTES", 300)
        patch.setattr("transfer.tcp_connection._TURN_BYTES", 1000)
        patch.setattr("transfer.serving._CALL_BYTES", 700)
        patch.setattr("transfer.sending._TURN_BYTES", 2000)
        yield


@pytest.mark.parametrize("transport", ["auto", "shm", "tcp"])
@pytest.mark.filterwarnings("error")  # also of a thread that died
def test_random_schedules(pools, transport, caplog):
    def world(choose: random.Random) -> World:
        threads, at_once = choose.randint(1, 3), choose.choice([0, 5 * PAGE])
        return World(pools, transport=transport, num_threads=threads, at_once_bytes=at_once)

    with unharmed(caplog):
        run_schedules(world, 1000)
    for boot, pool in pools.items():
        assert bytes(pool.memory.view) == pattern(boot, PAGE * SOURCE_PAGES).tobytes()


@pytest.fixture(scope="module")
def parted_pools():
    with closing(*(PartedPool(boot=slot, shape=THEIRS, codec=None) for slot in SLOTS)) as pools:
        yield {pool.address.boot: pool for pool in pools}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.filterwarnings("error")
def test_random_schedules_of_parts_of_pages(parted_pools, transport, caplog):
    def world(choose: random.Random) -> World:
        threads, at_once = choose.randint(1, 3), choose.choice([0, 5 * PAGE])
        return World(
            parted_pools,
            transport=transport,
            num_threads=threads,
            at_once_bytes=at_once,
            shape=OURS,
            lands_verified=True,
        )

    with unharmed(caplog):
        run_schedules(world, 400)


# ---- fetchers that break a law --------------------------------------------------------------------------------


def frees_pages_at_abort(fetcher: PageFetcher) -> None:
    """Answers a cancelled fetch before its copy has ended."""
    fetch, cancel, live = fetcher.fetch, fetcher.cancel, dict[object, tuple[FetchJob, OnDone]]()

    def begin(job: FetchJob, on_done: OnDone) -> None:
        def once(result: FetchResult) -> None:
            if live.pop(result.key, None) is not None:
                on_done(result)

        live[job.key] = job, on_done
        fetch(job, once)

    def end(key: object) -> None:
        job, on_done = live.pop(key, (None, None))
        if job is not None:
            on_done(
                FetchResult(
                    key=key,
                    peer=job.peer,
                    ok=False,
                    error="cancelled",
                    cancelled=True,
                    bytes=0,
                    seconds=0.0,
                    queued_seconds=0.0,
                    transport="",
                )
            )
        cancel(key)

    fetcher.fetch, fetcher.cancel = begin, end


def answers_twice(fetcher: PageFetcher) -> None:
    fetch = fetcher.fetch
    fetcher.fetch = lambda job, on_done: fetch(job, lambda result: (on_done(result), on_done(result)))


def forgets_every_third(fetcher: PageFetcher) -> None:
    """A wait without end."""
    fetch, numbers = fetcher.fetch, itertools.count(1)
    fetcher.fetch = lambda job, on_done: fetch(job, on_done if next(numbers) % 3 else lambda result: None)


def believes_everything(fetcher: PageFetcher) -> None:
    """Counts pages as right without a look at them."""

    class Trusting(type(fetcher._landing)):
        def landed(self, copy, transport, count):
            first = copy.done_pages
            for page in copy.job.target_pages[first : first + count]:
                self._faults.after_copy(copy.site(transport), self.view[page * PAGE : (page + 1) * PAGE])
            copy.done_pages = first + count

    fetcher._landing.__class__ = Trusting


def writes_beside_its_pages(fetcher: PageFetcher) -> None:
    """One byte too many, into whatever page comes next."""

    class Careless(type(fetcher._landing)):
        def landed(self, copy, transport, count):
            last = copy.job.target_pages[copy.done_pages + count - 1]
            if last + 1 not in copy.job.target_pages and (last + 1) * PAGE < len(self.view):
                self.view[(last + 1) * PAGE] ^= 1
            super().landed(copy, transport, count)

    fetcher._landing.__class__ = Careless


def takes_the_page_next_to_it(fetcher: PageFetcher) -> None:
    """Another page of the peer than was asked for, where nothing is verified."""
    fetch = fetcher.fetch

    def shifted(job: FetchJob, on_done: OnDone) -> None:
        if not job.checksums:
            sources = [(page + 1) % SOURCE_PAGES for page in job.source_pages]
            job = FetchJob(
                key=job.key,
                peer=job.peer,
                source_pages=sources,
                target_pages=job.target_pages,
                deadline=job.deadline,
            )
        fetch(job, on_done)

    fetcher.fetch = shifted


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("break_law", "complaint"),
    [
        (frees_pages_at_abort, "written to while nobody's"),
        (answers_twice, "answers for"),
        (forgets_every_third, "never answered"),
        (believes_everything, "wrong and called right"),
        (writes_beside_its_pages, "written to while nobody's"),
        (takes_the_page_next_to_it, "wrong and called right"),
    ],
)
def test_a_broken_law_is_found(pools, transport, break_law, complaint):
    def spoiled(choose: random.Random) -> World:
        world = World(pools, transport=transport, num_threads=choose.randint(1, 3), break_law=break_law)
        world.wait_s = 0.5
        return world

    with pytest.raises(LawBroken, match=complaint) as caught:
        run_schedules(spoiled, 300)
    assert any("SCHEDULE_SEED=" in note for note in caught.value.__notes__)
