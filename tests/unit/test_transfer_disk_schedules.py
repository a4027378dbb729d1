"""The random schedules of `test_transfer_schedules.py`, by way of a folder: pages are offered late, or never."""

from __future__ import annotations

import logging
import threading

import pytest
from disk_peer import SpoolingPool
from hypothesis import given, settings
from hypothesis import strategies as st
from test_transfer_schedules import BOOTS, PAGE, SOURCE_PAGES, World, operations
from transfer_pools import WAIT_S, closing, pattern

from transfer.disk.packs import SpoolLimits


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr("transfer.disk.transport._BLOCK_BYTES", 3 * PAGE)
    monkeypatch.setattr("transfer.disk.spool._PACK_BYTES", 4 * PAGE)
    monkeypatch.setattr("transfer.disk.packs._SLACK_RECORDS", 8)


@pytest.fixture
def pools(tmp_path, small_pieces):
    limits = SpoolLimits(max_bytes=20 * PAGE)  # less than a pool holds: pages go, and come again
    sizes = {"page_bytes": PAGE, "num_pages": SOURCE_PAGES}
    with closing(*(SpoolingPool(tmp_path, boot=boot, limits=limits, **sizes) for boot in BOOTS)) as pools:
        yield {pool.address.boot: pool for pool in pools}


class DiskWorld(World):
    """Offers what is fetched; while an answer is waited for, time passes."""

    num_right = 0

    def checksums(self, pool, sources, verified):
        """Where other transports would not verify, the last page is never offered."""
        checksums = pool.checksums(sources)
        offered = len(sources) - (not verified)
        pool.spool.offer(sources[:offered], checksums[:offered])
        return checksums

    def settle(self, key):
        self.go()
        pool = self.running[key][1]
        assert pool.spool.wait_idle(WAIT_S)
        with self.answered:
            for _ in range(1000):
                if self.answered.wait_for(lambda: key in self.answers, 0.005):
                    break
                self.clock.advance(0.5)
        super().settle(key)
        result = self.answers[key][0]
        DiskWorld.num_right += bool(result.ok and result.bytes)

    def close(self):
        for key in list(self.running)[::2]:  # the others are cut short
            self.settle(key)
        super().close()
        (transport,) = self.fetcher._transports
        assert transport._waits == {}, "a copy ended, and its wait did not"


@pytest.mark.filterwarnings("error")  # also of a thread that died
def test_random_schedules_by_disk(pools, tmp_path, caplog):
    @settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @given(operations, st.integers(1, 3))
    def schedules(schedule, num_threads):
        world = DiskWorld(pools, "disk", num_threads, folder=tmp_path)
        try:
            for operation in schedule:
                world.run(operation)
        finally:
            world.close()

    before = threading.active_count()
    schedules()
    assert DiskWorld.num_right > 50
    assert threading.active_count() == before
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    for boot, pool in pools.items():
        assert bytes(pool.memory.view) == pattern(boot, PAGE * SOURCE_PAGES).tobytes()
